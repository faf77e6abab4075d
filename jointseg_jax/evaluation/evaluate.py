"""What a trained workdir is worth, in numbers.

A codec run: what it was given against what it gives back, over the validation split. A joint run:
its annotation codec on validation labels, then ``num`` pairs generated from validation captions: do
image and mask agree (a judge's labels of the image against the mask, chance beside it), and do the
masks hold what the real ones of these captions hold (MCD). A run that needs maps given gets those
of the validation split. A bridge: both directions (``bridge.py``).

Of several processes each generates its share of the pairs; all measure the same, the first writes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jointseg_jax import build, jsonl, sharding
from jointseg_jax.codecs.chain import Chain
from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.data.pipeline import evaluation_batches
from jointseg_jax.data.sources.scenes import HUES, oracle_labels
from jointseg_jax.evaluation.alignment import Alignment, Reconstruction, cycle, number
from jointseg_jax.evaluation.counts import share_difference, shares
from jointseg_jax.evaluation.cycle import bridge_report
from jointseg_jax.evaluation.pair_images import ImageReconstruction
from jointseg_jax.evaluation.panoptic_quality import PanopticReconstruction
from jointseg_jax.generation.generate import sample
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.systems.bridge import Bridge
from jointseg_jax.systems.joint import TEXT_STREAM, Joint
from jointseg_jax.training.workdir import Run, load_run
from jointseg_jax.types import FILE_VOID, VOID, Array, UserError

PER_DEVICE = 8
"""Label maps that a device codes at a time."""

PROMPTS = 512
"""Validation captions to sample from, if there are so many; more when more pairs are wanted."""

Judge = Callable[[np.ndarray], np.ndarray]

log = logging.getLogger("jointseg_jax")


def evaluate(
    workdir: Path,
    num: int = 256,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    steps: Sequence[int] = (),
    refine: int | None = None,
) -> dict[str, Any]:
    """Measures a workdir, writes ``WORKDIR/evaluation.json`` and returns it.

    Args:
      num: pairs to generate; a codec run has none.
      seed: of the pairs' noise and of the shuffle for chance.
      size: (height, width) to which a codec run's validation maps are resized and cropped, in
        place of the config's.
      steps: numbers of solver steps to compare; the config's alone when there are none.
      refine: refinement steps of a label autoencoder run, in place of its config's.
    """
    workdir = Path(workdir)
    run = load_run(workdir)
    report: dict[str, Any] = {"step": run.step, "checkpoint_digest": run.digest}
    if size is not None:
        resize = {"name": "resize", "size": size, "mode": "crop"}
        own = run.config["evaluate"] | {"transforms": {"resize": resize}}
        run = dataclasses.replace(run, config=run.config | {"evaluate": own})
        report["size"] = list(size)
    if refine is not None:
        run = dataclasses.replace(run, system=_refining(run, refine))
        report["refine"] = refine
    report |= REPORTS[type(run.system)](run, num, seed, steps)
    if jax.process_index() == 0:
        (workdir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _refining(run: Run, steps: int) -> Autoencode:
    codec = getattr(run.system, "codec", None)
    if not isinstance(codec, LabelAE):
        raise UserError(f"{run.workdir}: --refine is for runs of a label_ae codec; leave it out.")
    return dataclasses.replace(run.system, codec=dataclasses.replace(codec, refine=steps))


def autoencoder_report(run: Run, num: int, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """The run's codec on the validation split, and under ``chain`` labels through a palette."""
    codec, palette = run.system.codec, run.system.palette
    report = codec_report(run, codec, run.params, run.system.field, None)
    if palette is None:
        return report
    chain = Chain(first=palette, second=codec)
    return report | {"chain": codec_report(run, chain, run.params, "labels", None)}


def codec_report(
    run: Run, codec: Any, params: Any, field: str, limit: int | None
) -> dict[str, Any]:
    """What a codec gives back of a field of the validation records (the first ``limit``)."""
    mesh = sharding.own_mesh()
    rows = sharding.batch_sharding(mesh)

    @jax.jit
    def there_and_back(params: Any, values: Array) -> tuple[Array, Array, Array]:
        latents = codec.encode(params, values).astype(jnp.float32)
        per_row = tuple(range(1, latents.ndim))
        moments = jnp.mean(latents, per_row), jnp.mean(jnp.square(latents), per_row)
        return codec.decode(params, latents), *moments

    measured = RECONSTRUCTIONS[codec.kind](run.info.classes)
    moments: list[np.ndarray] = []
    params = jax.device_put(params, sharding.replicated(mesh))
    for batch in validation(run, PER_DEVICE * mesh.size, limit, "codec"):
        with jax.set_mesh(mesh):
            values = jax.device_put(batch[field], rows)
            decoded, mean, square = map(np.asarray, there_and_back(params, values))
        valid = batch["valid"]
        measured.add(batch[field], decoded, valid)
        moments.append(np.stack([mean, square], axis=-1)[valid])
    mean, square = np.concatenate(moments).mean(axis=0, dtype=np.float64)
    deviation = number(np.sqrt(max(square - mean**2, 0.0)))
    records = sum(len(rows) for rows in moments)
    return measured.report() | {"latent_std": deviation, "validation_records": records}


RECONSTRUCTIONS = {
    "labels": lambda classes: Reconstruction(classes.names),
    "panoptic": PanopticReconstruction,
    "image": lambda classes: ImageReconstruction(),
}
"""What measures a codec, by its kind, given the classes."""


def both_directions(run: Run, num: int, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """A bridge from images to labels and back."""
    rows = PER_DEVICE * jax.local_device_count()
    batches = functools.partial(validation, run, rows, num, "pairs")
    steps = steps or (run.system.solver.steps,)
    count = min(num, len(build.source(run.config, "val")))
    return bridge_report(run, batches, count, find_judge(run), seed, steps)


def joint_report(run: Run, num: int, seed: int, steps: Sequence[int]) -> dict[str, Any]:
    """The run's annotation codec, then its generated pairs; a table if steps are compared."""
    name, stream = label_stream(run)
    judge = find_judge(run)
    report = codec_report(run, stream.codec, run.frozen.get(name, {}), stream.field, num)
    prompts, features, real = references(run, num)
    given = HeldOutMaps(run, len(prompts)) if set(run.system.known) - {TEXT_STREAM} else None

    def judged(count: int | None) -> dict[str, Any]:
        made = sample(
            run.workdir,
            pairs_folder(run, seed, len(prompts), count),
            num=num,
            prompts=prompts,
            features=features,
            given=given,
            seed=seed,
            steps=count,
        )
        pairs = PairFolder(Path(made["out"]), num)
        return pairs_report(run, pairs, real, judge, seed) | {"grid": made["grid"]}

    if not steps:
        return report | judged(None)
    return report | {"table": [{"steps": count} | judged(count) for count in steps]}


class HeldOutMaps:
    """The first label maps of the validation split, as inputs to sample from."""

    kind = "labels"

    def __init__(self, run: Run, count: int):
        self.source = build.source(run.config, "val")
        self.transforms = build.evaluation_transforms(run.config)
        self.ids = tuple(f"{i:08d}" for i in range(count))
        self.captions = ((),) * count

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """One map, as the evaluation transforms bring it to the model's size."""
        record = self.source[index]
        for transform in self.transforms:
            record = transform(record, np.random.default_rng(0), False)
        if record["labels"].shape != size:
            raise UserError(
                f"config.evaluate.transforms give maps of {record['labels'].shape}, the model "
                f"makes pairs of {size}; let them end with a resize to that size."
            )
        return record["labels"]

    def fingerprint(self) -> dict[str, Any]:
        """What tells these maps from others."""
        return build.plain(self.source.fingerprint()) | {"count": len(self)}


def label_stream(run: Run) -> tuple[str, Any]:
    """The stream of a joint run that is an annotation."""
    for name, stream in run.system.streams.items():
        if stream.codec.kind in ("labels", "panoptic"):
            return name, stream
    raise UserError(
        f"{run.workdir}: no stream of this run is an annotation "
        f"({', '.join(run.system.streams)}); there is nothing to evaluate."
    )


def validation(
    run: Run, batch: int, limit: int | None, what: str
) -> Iterator[Mapping[str, np.ndarray]]:
    """Host batches, with ``valid``, of the validation split as ``config.evaluate`` transforms it.

    Args:
      what: the progress bar's title.
    """
    source, data = build.source(run.config, "val"), run.config["data"]
    count = min(limit or len(source), len(source))
    with evaluation_batches(
        source,
        batch=batch,
        transforms=build.evaluation_transforms(run.config),
        limit=count,
        workers=data.get("workers", 0),
        threads=data.get("threads", 2),
        bad=data.get("bad", "replace"),
        bad_limit=data.get("bad_limit", 100),
        instances=build.instances(run.config),
    ) as batches:
        total = -(-count // batch)
        quiet = jax.process_index() > 0
        yield from tqdm(
            batches, total=total, unit="batch", desc=what, dynamic_ncols=True, disable=quiet
        )
        for report in batches.drain():
            log.warning("%s", report["error"])


def references(run: Run, num: int) -> tuple[list[str], np.ndarray | None, np.ndarray]:
    """Validation captions to sample from (and their features, where the records carry them), and
    the class shares of the real masks they belong to.

    The number of captions does not follow ``num`` below ``PROMPTS``, so that more pairs of the
    same seed go on where fewer ended.
    """
    source = build.source(run.config, "val")
    prompts, features, real = [], [], []
    for batch in validation(run, PER_DEVICE, max(num, PROMPTS), "captions"):
        valid = batch["valid"]
        real.append(shares(batch["labels"][valid], len(run.info.classes)))
        for index in batch["index"][valid]:
            prompts.append(next(iter(source[int(index)]["captions"]), ""))
        if "text" in batch:
            features.append(batch["text"][valid])
    return prompts, np.concatenate(features) if features else None, np.concatenate(real)


def pairs_folder(run: Run, seed: int, prompts: int, steps: int | None = None) -> Path:
    """Where the pairs of a checkpoint, a seed and a number of steps are kept."""
    more = f"-prompts{prompts}" if prompts > PROMPTS else ""
    more += "" if steps is None else f"-steps{steps}"
    return run.workdir / "evaluation" / f"pairs-{run.step}-seed{seed}{more}"


class Pair(NamedTuple):
    """A generated pair."""

    image: np.ndarray
    mask: np.ndarray


class PairFolder(Sequence[Pair]):
    """The first pairs of a folder that ``sample`` has written, read when asked for."""

    def __init__(self, folder: Path, num: int):
        self.folder = folder
        self.lines = list(
            itertools.islice(jsonl.read_until_damaged(folder / "manifest.jsonl"), num)
        )

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Pair:
        line = self.lines[index]
        values = np.asarray(Image.open(self.folder / line["annotation"])).astype(np.int16)
        mask = np.where(values == FILE_VOID, VOID, values).astype(np.int16)
        return Pair(np.asarray(Image.open(self.folder / line["image"])), mask)


def pairs_report(
    run: Run, pairs: Sequence[Pair], real: np.ndarray, judge: Judge | None, seed: int
) -> dict[str, Any]:
    """Alignment, its chance level and MCD of generated pairs.

    Args:
      real: class shares of the real masks; pair ``i`` was made from caption ``i mod len(real)``.
      judge: None leaves the alignment fields null.
    """
    classes = run.info.classes
    alignment = Alignment(classes.names)
    order = cycle(len(pairs), seed)
    stranger = pairs[int(order[-1])].mask if len(pairs) > 1 else None
    with_void, without = [], []
    for index in order:
        pair = pairs[int(index)]
        if judge is not None:
            alignment.add(judge(pair.image), pair.mask, stranger)
        stranger = pair.mask if len(pairs) > 1 else None
        truth, made = real[index % len(real)], shares(pair.mask, len(classes))
        with_void.append(share_difference(truth, made))
        without.append(share_difference(truth, made, void=False))
    counts = {"mcd": number(np.mean(with_void)), "mcd_without_void": number(np.mean(without))}
    fields = alignment.report()
    if judge is None:
        fields = dict.fromkeys(fields)
    name = run.config["evaluate"]["judge"] or None
    return {"pairs": len(pairs), "judge": name} | fields | counts


def find_judge(run: Run) -> Judge | None:
    """The judge that ``config.evaluate.judge`` names; None for ``""``, and a line that says why."""
    name = run.config["evaluate"]["judge"]
    if name == "":
        log.info(
            "alignment is not measured: config.evaluate.judge is empty. A judge labels generated "
            "images; one of: %s (for data whose classes it knows).",
            ", ".join(JUDGES),
        )
        return None
    if name not in JUDGES:
        raise UserError(
            f'config.evaluate.judge: {name!r} is unknown; "" or one of: {", ".join(JUDGES)}.'
        )
    return JUDGES[name](run.info.classes.names)


def oracle(names: Sequence[str]) -> Judge:
    """The exact labels of the embedded scenes, whose categories each own a hue."""
    unknown = [name for name in names if name not in HUES]
    if unknown:
        raise UserError(
            f"config.evaluate.judge: the oracle knows the categories of `scenes` by their hue; "
            f'{len(unknown)} classes are none of these ({", ".join(unknown[:4])}). Set it to "".'
        )
    return lambda image: oracle_labels(image, tuple(names))


JUDGES = {"oracle": oracle}
"""Makers of judges, (class names) -> (uint8 image -> labels), by their name in a config."""

REPORTS = {Autoencode: autoencoder_report, Bridge: both_directions, Joint: joint_report}
"""What measures a run, (run, num, seed, steps) -> JSON values, by its system."""
