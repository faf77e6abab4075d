"""The sampling loop: from a trained run to a folder of pairs, which depend on (seed, index) alone.

Batches over all devices of a process (``generation/sampler.py``), of which one is being made while
the one before it is cleaned up and written (``generation/pair_writer.py``). Several processes take
the batches in turn and write the files of their pairs; the first process writes the manifest, a
round at a time (``generation/rounds.py``). The folder is the same as from one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from tqdm import tqdm

from jointseg_jax import build, distributed
from jointseg_jax.annotations import instances, masks, viz
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.images import decode_segment_ids
from jointseg_jax.generation import unread_words
from jointseg_jax.generation.filters import Filters, rejections
from jointseg_jax.generation.pair_names import PairNames
from jointseg_jax.generation.pair_writer import PairWriter, read_mask
from jointseg_jax.generation.rounds import RoundWriter
from jointseg_jax.generation.sampler import (
    PER_DEVICE,
    Fields,
    PendingBatch,
    Sampler,
    Text,
    make_sampler,
    one_ahead,
    pending_batches,
    with_options,
)
from jointseg_jax.generation.unread_words import Unread
from jointseg_jax.systems.system import Generator
from jointseg_jax.training.workdir import Run
from jointseg_jax.types import UserError, require_seed

FIELDS = {"images": "image", "labels": "labels"}
"""Kinds of conditions -> the batch field that they are."""


@runtime_checkable
class Condition(Protocol):
    """Images or label maps to start from, such as ``data.given.Given``, of a kind in ``FIELDS``."""

    kind: str

    def __len__(self) -> int: ...

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the items; their numbers where they have none."""
        return tuple(f"{i:08d}" for i in range(len(self)))

    @property
    def captions(self) -> tuple[tuple[str, ...], ...]:
        """Captions of each item, maybe none."""
        return ((),) * len(self)

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Returns an item at (height, width)."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Returns plain values that differ for other items."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is asked of ``sample``."""

    num: int | None = None
    """Pairs; None is one for each item of the condition, else 64. Beyond the items they come again,
    with other noise."""
    prompts: Sequence[str] = ()
    """Repeated in order; none: the condition's captions if it has any, else the first captions of
    the training data."""
    features: np.ndarray | None = None
    """Of the prompts, [prompts, tokens, width], for a run whose text is precomputed features."""
    condition: Condition | None = None  # label maps or images to start from
    seed: int = 0
    steps: int | None = None  # of the solver; None is the config's number
    guidance: float | None = None  # scale of every stream; None is the config's of each
    per_device: int = PER_DEVICE  # pairs per device and batch
    absorb: int = 0  # label regions of fewer pixels are merged into their surroundings; 0: off
    min_instance: int = 16  # parts of instances with fewer pixels are merged likewise
    extra_images: tuple[str, ...] = ()  # further pictures to write, names of ``EXTRA_IMAGES``
    filters: Filters = dataclasses.field(default_factory=Filters)
    """What a pair must have; one that has not is listed without files, and counts."""

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @property
    def count(self) -> int:
        """Number of pairs."""
        return self.num or (64 if self.condition is None else len(self.condition))


def check_seed(seed: int) -> None:
    """Refuses a seed of more than 32 bits before anything is written.

    Raises:
      UserError: the seed is no whole number in 0..2^32 - 1.
    """
    try:
        require_seed("seed", seed)
    except ValueError as error:
        raise UserError(f"ERROR [flags] --{error} Give one of these.") from error


def sample(run: Run, out: Path, options: SampleOptions) -> dict[str, Any]:
    """Generates pairs into the folder ``out``; the same call goes on where one was interrupted.

    Returns:
      The number of pairs (``made_now`` of them by this call), the rejected ones by filter, the
      folder, and a sheet of its first pairs.

    Raises:
      UserError: the run cannot do what the options ask for, or the folder has other settings.
    """
    # ---------------------------------------------------------------- system and options
    system, options = resolved(run, options)

    names = None if options.condition is None else PairNames(options.condition.ids)

    # ------------------------------------------- folder first: it knows which pairs are missing
    writer = RoundWriter(out, run.info.classes, settings_of(run, system, options))
    inputs = Inputs(prompt_rows(run, options.prompts, options.features), options.condition)
    unread = unread_words.unread_words(run, options.prompts)
    if distributed.is_first():
        unread_words.say(unread)
    sampler = make_sampler(run, system, per_device=options.per_device)

    # ---------------------------------------------------------------- one batch after the other
    pending = pending_batches(writer.start, options.count, sampler.batch_size, writer.needed)
    title = {"unit": "pair", "desc": "sampling", "dynamic_ncols": True}
    start, quiet = min(writer.start, options.count), not distributed.is_first()
    with tqdm(total=options.count, initial=start, disable=quiet, **title) as bar:
        for indices, pairs in host_pairs(sampler, inputs, options.seed, system.size, pending):
            for row, index in enumerate(indices.tolist()):
                pair = {k: rows[row] for k, rows in pairs.items()}
                bar.update(write_pair(writer, index, pair, options, unread, names))
            # Also after an empty batch: the first process waits for the lines of every other one.
            bar.update(writer.end_round())

    # ---------------------------------------------------------------- report
    report = json.loads(distributed.from_first(lambda: _finish(writer, out, options)))
    return report | unread_words.counts(unread)


def resolved(run: Run, options: SampleOptions) -> tuple[Generator, SampleOptions]:
    """The system that the options ask for, and the options with the prompts that hold by default.

    Raises:
      UserError: the run cannot do what the options ask for.
    """
    system = with_options(run.system, steps=options.steps, guidance=options.guidance)
    condition = options.condition
    try:
        system.check_condition(() if condition is None else (FIELDS[condition.kind],))
    except ValueError as error:
        hint = "On the command line: --given annotations=DIR or --given images=DIR."
        raise UserError(f"{error} {hint}") from error
    firsts = () if condition is None else [next(iter(c), "") for c in condition.captions]
    captions = firsts if any(firsts) else ()  # of every item, unless no item has any
    prompts = options.prompts or captions or run.info.captions or ("",)
    return system, dataclasses.replace(options, prompts=tuple(prompts))


def host_pairs(
    sampler: Sampler,
    inputs: Inputs,
    seed: int,
    size: tuple[int, int],
    pending: Iterable[PendingBatch],
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields the needed indices of each batch and their pairs, one batch made ahead."""
    # the sampler returns while the devices work
    started = ((b, sampler(seed, b.indices, *inputs.rows(b.indices, size))) for b in pending)
    for batch, made in one_ahead(started):
        # whole arrays come to the host: a slice of one on the device is a program of its own
        pairs = {k: np.asarray(rows)[batch.needed] for k, rows in made.items()}
        yield batch.indices[batch.needed], pairs


def settings_of(run: Run, system: Generator, options: SampleOptions) -> dict[str, Any]:
    """Returns everything that the pairs depend on, as ``OUT/settings.json`` keeps it.

    Folders made long ago go on only if these keys and values stay as they are. Options at their
    default have no key, so that folders from before there was such an option still agree.
    """
    settings: dict[str, Any] = {
        "checkpoint_step": run.step,
        "checkpoint_digest": run.digest,
        "seed": options.seed,
        "steps": system.solver.steps,
        "guidance": {k: s.guidance for k, s in system.streams.items()},
        "per_device_batch": options.per_device,  # the shape of a product decides on its last bit
        "absorb": options.absorb,
        "prompts": len(options.prompts),
        "prompts_sha256": hashlib.sha256("\n".join(options.prompts).encode()).hexdigest(),
    }
    if "panoptic" in {s.codec.kind for s in system.streams.values()}:
        settings["min_instance"] = options.min_instance
    if options.condition is not None:
        settings["given"] = options.condition.fingerprint()
    if options.extra_images:
        settings["more"] = sorted(options.extra_images)
    if options.filters != Filters():
        settings["filters"] = dataclasses.asdict(options.filters)
    return settings


class Inputs(NamedTuple):
    """What pairs are made from; row or item ``index mod n`` belongs to pair ``index``."""

    text: Text
    condition: Condition | None

    def rows(self, indices: np.ndarray, size: tuple[int, int]) -> tuple[Text, Fields]:
        """Returns text and batch fields to start from, a row per index."""
        text, condition = self.text, self.condition
        rows = None if text is None else text[indices % len(text)]
        if condition is None or not len(indices):
            return rows, {}
        items = [condition.load(int(i) % len(condition), size) for i in indices]
        return rows, {FIELDS[condition.kind]: np.stack(items)}


def prompt_rows(run: Run, prompts: Sequence[str], features: np.ndarray | None) -> Text:
    """Returns what the system reads as text, one row per prompt: token ids, or their features.

    Raises:
      UserError: the run reads features, and there are none or of another shape.
    """
    text = run.system.text
    if text is None:
        return None
    tokenizer = build.tokenizer(run.config.system, run.info.vocabulary)
    if tokenizer is not None:
        return np.stack([tokenizer.encode(prompt) for prompt in prompts])
    # The run was trained on features of another program; nothing here can make them from words.
    shape = (len(prompts), text.length, text.width)
    if features is None or features.shape != shape:
        raise UserError(
            f"{run.workdir}: this run reads text features, not words: give one array of shape "
            f"{shape} (prompts, tokens, width) for its prompts with --text_features FILE.npy; "
            f"given: {None if features is None else features.shape}."
        )
    return features.astype(np.float32)


def write_pair(
    writer: RoundWriter,
    index: int,
    made: Mapping[str, np.ndarray],
    options: SampleOptions,
    unread: Mapping[str, Unread],
    names: PairNames | None,
) -> int:
    """Cleans up, judges and writes one pair; returns how many pairs were listed by that."""
    classes, condition = writer.pairs.classes, options.condition
    pair = cleaned(made, classes, absorb=options.absorb, min_instance=options.min_instance)
    confidence = float(pair["confidence"].mean(dtype=np.float64))
    fields: dict[str, object] = {"seed": options.seed, "confidence": round(confidence, 6)}
    if condition is not None:
        fields["given"] = condition.ids[index % len(condition)]
    name = None if names is None else names(index)
    prompt = options.prompts[index % len(options.prompts)]
    fields |= unread.get(prompt, Unread()).fields()
    if reason := options.filters.reason(pair):
        return writer.reject(index, prompt, fields, reason, name=name)
    extra = {k: EXTRA_IMAGES[k](pair, classes) for k in options.extra_images}
    image, labels, segments = pair["image"], pair["labels"], pair.get("segments")
    return writer.write(
        index, prompt, image, labels, fields, segments, name=name, extra_images=extra
    )


def cleaned(
    pair: Mapping[str, np.ndarray], classes: Classes, *, absorb: int, min_instance: int
) -> dict[str, np.ndarray]:
    """Returns a generated pair after clean-up of its mask and its instances."""
    labels = pair["labels"]
    if absorb:
        labels = masks.absorb(labels, absorb)
    if "segments" not in pair:
        return {**pair, "labels": labels}
    # Instances second: absorbing can cut off the last pixels that made a part large enough.
    labels, segments = instances.clean(
        labels, pair["segments"], classes.isthing, min_size=min_instance
    )
    return {**pair, "labels": labels, "segments": segments}


EXTRA_IMAGES = {
    "overlay": lambda pair, classes: viz.overlay(
        pair["image"], pair["labels"], classes, segments=pair.get("segments")
    ),
    "confidence": lambda pair, _: np.round(255 * pair["confidence"]).astype(np.uint8),
}
"""Further pictures of a pair, (pair, classes) -> uint8, by the name of their folder."""


def _finish(writer: RoundWriter, out: Path, options: SampleOptions) -> str:
    """Completes the manifest and draws the sheet, on the first process; returns JSON for all."""
    pairs = writer.pairs
    pairs.close()
    report: dict[str, object] = {"pairs": pairs.done, "made_now": pairs.done - writer.there}
    if options.filters != Filters():
        report["rejected"] = rejections(pairs.lines)
    grid = contact_sheet(out, pairs)
    return json.dumps(report | {"out": str(out), "grid": str(grid)})


def contact_sheet(out: Path, pairs: PairWriter, count: int = 32) -> Path:
    """Draws ``OUT/grid.png``: the first pairs as image, mask and overlay with their prompts."""
    lines = [line for line in pairs.lines if "rejected" not in line][:count]
    segments = [out / line["panoptic"] for line in lines if "panoptic" in line]
    sheet = viz.pair_sheet(
        [np.asarray(Image.open(out / line["image"])) for line in lines],
        [read_mask(out / line["annotation"]) for line in lines],
        pairs.classes,
        captions=[line["prompt"] for line in lines],
        segments=[decode_segment_ids(p.read_bytes(), str(p)) for p in segments] or None,
    )
    with pairs.explained(out / "grid.png"):
        viz.save_png(out / "grid.png", sheet)
    return out / "grid.png"
