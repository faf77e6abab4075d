"""What a joint run is worth: its annotation codec, and pairs generated from validation captions.

1. alignment: do image and mask agree? A judge's labels of the image against the mask, with its
   level of chance
2. MCD: do the masks hold what the real masks of these captions hold?
3. of scenes that the oracle judges: what a person sees in them, with real ones beside
   (``scene_report.py``)

A run whose network sees given maps gets those of the validation split.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jointseg_jax import jsonl
from jointseg_jax.evaluation.alignment import Alignment, Judge, cycle, find_judge, number
from jointseg_jax.evaluation.codec_report import codec_report
from jointseg_jax.evaluation.confusion import share_difference, shares
from jointseg_jax.evaluation.held_out import PROMPTS, HeldOutMaps, References, references
from jointseg_jax.evaluation.scene_report import MOST, pairs_scenes, real_scenes, scene_source
from jointseg_jax.generation.pair_writer import read_mask
from jointseg_jax.generation.sample import SampleOptions, sample
from jointseg_jax.generation.sampler import ANNOTATIONS
from jointseg_jax.systems.joint import TEXT_STREAM
from jointseg_jax.systems.system import Stream
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import UserError


def joint_report(run: Run, num: int, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """Measures the annotation codec, then the pairs; as a table if numbers of steps are given."""
    name, stream = label_stream(run)
    judge = find_judge(run)
    report = codec_report(run, stream.codec, run.frozen.get(name, {}), stream.field, num)
    real = references(run, num)
    if not steps:
        report |= _sampled_report(run, num, seed, None, real, judge)
    else:
        rows = [{"steps": n} | _sampled_report(run, num, seed, n, real, judge) for n in steps]
        report["table"] = rows
    source = scene_source(run.config)
    return report if source is None else report | real_scenes(source, num)


def _sampled_report(
    run: Run, num: int, seed: int, steps: int | None, real: References, judge: Judge | None
) -> dict[str, Any]:
    """Generates pairs (or finds them from an earlier evaluation), and measures them."""
    count = len(real.prompts)
    needs_maps = set(run.system.known) - {TEXT_STREAM}
    options = SampleOptions(
        num=num,
        prompts=real.prompts,
        features=real.features,
        condition=HeldOutMaps(run, count) if needs_maps else None,
        seed=seed,
        steps=steps,
    )
    sampled = sample(run, pairs_folder(run, seed, count, steps), options)
    pairs = PairFolder(Path(sampled["out"]), num)
    report = pairs_report(run, pairs, real.shares, judge, seed) | {"grid": sampled["grid"]}
    source = scene_source(run.config)
    if source is None:
        return report
    first = [pairs[i] for i in range(min(len(pairs), MOST))]
    images, masks = (np.stack(parts) for parts in zip(*first))
    prompts = [real.prompts[i % count] for i in range(len(first))]
    return report | pairs_scenes(images, masks, prompts, source, seed)


def label_stream(run: Run) -> tuple[str, Stream]:
    """Returns the stream of a joint run that is an annotation, with its name."""
    for name, stream in run.system.streams.items():
        if stream.codec.kind in ANNOTATIONS:
            return name, stream
    raise UserError(
        f"{run.workdir}: no stream of this run is an annotation "
        f"({', '.join(run.system.streams)}); there is nothing to evaluate."
    )


def pairs_folder(run: Run, seed: int, prompts: int, steps: int | None = None) -> Path:
    """Returns where the pairs of a checkpoint, a seed and a number of steps are kept."""
    # Another number of captions would make other pairs, hence another folder.
    suffix = f"-prompts{prompts}" if prompts > PROMPTS else ""
    suffix += "" if steps is None else f"-steps{steps}"
    return run.workdir / "evaluation" / f"pairs-{run.step}-seed{seed}{suffix}"


class Pair(NamedTuple):
    """A generated pair."""

    image: np.ndarray  # [height, width, 3] uint8
    mask: np.ndarray  # [height, width], VOID where nothing is annotated


class PairFolder:
    """The first pairs of a folder that ``sample`` has written, each read when it is indexed."""

    def __init__(self, folder: Path, num: int):
        self.folder = folder
        lines = jsonl.read_until_damaged(folder / "manifest.jsonl")
        self.lines = list(itertools.islice(lines, num))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Pair:
        line = self.lines[index]
        mask = read_mask(self.folder / line["annotation"])
        return Pair(np.asarray(Image.open(self.folder / line["image"])), mask)


def pairs_report(
    run: Run, pairs: PairFolder | Sequence[Pair], real: np.ndarray, judge: Judge | None, seed: int
) -> dict[str, Any]:
    """Measures alignment, its level of chance and MCD of generated pairs.

    Args:
      real: class shares of the real masks; pair ``i`` was made from caption ``i mod len(real)``.
      judge: None leaves the alignment fields null.
    """
    classes = run.info.classes
    alignment = Alignment(classes.names)
    order = cycle(len(pairs), seed)
    # One pass in the order of the cycle: the mask before is at hand, and no pair is read twice.
    other = pairs[int(order[-1])].mask if len(pairs) > 1 else None
    with_void, without = [], []
    for index in order:
        pair = pairs[int(index)]
        if judge is not None:
            alignment.add(judge(pair.image), pair.mask, other)
        other = pair.mask if len(pairs) > 1 else None
        truth, made = real[index % len(real)], shares(pair.mask, len(classes))
        with_void.append(share_difference(truth, made))
        without.append(share_difference(truth, made, void=False))
    counts = {"mcd": number(np.mean(with_void)), "mcd_without_void": number(np.mean(without))}
    fields = alignment.report()
    if judge is None:
        fields = dict.fromkeys(fields)
    name = run.config.evaluate.judge or None
    return {"pairs": len(pairs), "judge": name} | fields | counts
