"""The sampling loop: batches over all devices, every pair a function of (seed, index) alone.

1. indices ``i .. i + B`` -> keys ``sample_keys(seed, index)``, prompts ``prompts[index mod n]``,
   given images or label maps likewise
2. one jitted call: solver, decode, uint8; the next batch is dispatched before this one is written
3. host: clean-up of mask and instances, files, manifest

The batch is the same at every call (a short last one is padded), so there is one compilation.

Several processes take the batches in turn, each on its own devices and without a word between them,
and write the files of their pairs; the first process writes the manifest, a round at a time. Since
a pair depends on (seed, index) alone, the folder is the same as from one process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jointseg_jax import build, chips, distributed, rules, sharding
from jointseg_jax.annotations import instances, masks, viz
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.given import Given
from jointseg_jax.data.images import decode_segment_ids
from jointseg_jax.generation.filters import Filters, rejections
from jointseg_jax.generation.pair_writer import PairWriter
from jointseg_jax.generation.rounds import RoundWriter
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.system import Generator
from jointseg_jax.training.workdir import Run, load_run
from jointseg_jax.types import FILE_VOID, VOID, UserError

PER_DEVICE = 16

ANNOTATIONS = {"labels", "panoptic"}
"""Kinds of codecs that decode to labels."""


def with_options(system: Any, *, steps: int | None, guidance: float | None) -> Any:
    """The system with another number of solver steps, or one guidance scale for all streams."""
    if not isinstance(system, Generator):
        raise UserError("this workdir holds a codec; pairs are sampled from a joint or bridge run.")
    kinds = {k: s.codec.kind for k, s in system.streams.items()}
    if kinds and ("image" not in kinds.values() or not ANNOTATIONS & set(kinds.values())):
        raise UserError(
            f"the streams of this run decode to {kinds}; sampling writes an image and its labels. "
            "A run on cached latents needs an image codec that can decode them in their stead."
        )
    if guidance is not None and system.text is None:
        raise UserError("--guidance: this run has no text to be guided by; leave it out.")
    changes: dict[str, Any] = {}
    try:
        if steps is not None:
            changes["solver"] = dataclasses.replace(system.solver, steps=steps)
        if guidance is not None:
            changes["streams"] = {
                k: dataclasses.replace(s, guidance=guidance) for k, s in system.streams.items()
            }
        return dataclasses.replace(system, **changes)
    except ValueError as error:
        raise UserError(f"--steps {steps}, --guidance {guidance}: {error}") from error


def panoptic(system: Any) -> bool:
    """Whether the system's pairs have instances."""
    return any(s.codec.kind == "panoptic" for s in system.streams.values())


def sampler(system: Any, mesh: jax.sharding.Mesh) -> Any:
    """The jitted ``(params, frozen, text, given, seed, indices) -> pairs``, rows over the mesh."""

    def pairs(
        params: Any, frozen: Any, text: Any, given: Any, seed: jax.Array, indices: jax.Array
    ) -> Any:
        made = system.generate(params, frozen, text, sample_keys(seed, indices), condition=given)
        return jax.lax.with_sharding_constraint(made, sharding.batch_sharding(mesh))

    return jax.jit(pairs, compiler_options=chips.compiler_options(mesh))


def sampling_params(system: Any, params: Any) -> Any:
    """The parameters as the network multiplies by them: half the memory, the same pairs.

    A network of dtype bfloat16 rounds the kernels of its blocks before every product; here that is
    done once. Norms and what is outside the blocks count in float32 and stay.
    """
    dtype = getattr(getattr(system, "denoiser", None), "dtype", None)
    if dtype is None or jnp.dtype(dtype).itemsize != 2:
        return params
    leaves, structure = jax.tree.flatten(params)
    cast = [
        jnp.asarray(leaf, dtype) if re.search(ROUNDED, path) else leaf
        for path, leaf in zip(rules.paths(params), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, cast)


ROUNDED = (
    r"^denoiser/.*(in_blocks|mid_block|out_blocks)/(\d+/)?(attn|mlp|join|join_skip|kernel|bias)\b"
)
"""Paths of the parameters that blocks round; the last two are the exchange's of two streams."""


def generator(run: Run, system: Any, *, per_device: int = PER_DEVICE) -> Callable:
    """``make(text, seed, indices, given) -> pairs`` on the device, for ``make.batch`` rows."""
    mesh = sharding.own_mesh()
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    params = jax.device_put(sampling_params(system, run.params), everywhere)
    frozen = jax.device_put(run.frozen, everywhere)

    pairs = sampler(system, mesh)

    def make(text: np.ndarray | None, seed: int, indices: np.ndarray, given: Any) -> Any:
        text, given, placed = jax.device_put((text, given, indices.astype(np.uint32)), rows)
        with jax.set_mesh(mesh):
            return pairs(params, frozen, text, given, jnp.uint32(seed), placed)

    make.batch = per_device * mesh.size
    return make


def text_rows(
    run: Run, prompts: Sequence[str], features: np.ndarray | None = None
) -> np.ndarray | None:
    """What the system reads as text, one row per prompt: token ids, or features given for them.

    Raises:
      UserError: the run reads features and none (or others) are given.
    """
    text = run.system.text
    if text is None:
        return None
    tokenizer = build.tokenizer(run.config, run.info.vocabulary)
    if tokenizer is not None:
        return np.stack([tokenizer.encode(prompt) for prompt in prompts])
    wanted = (len(prompts), text.length, text.width)
    if features is None or features.shape != wanted:
        raise UserError(
            f"{run.workdir}: this run reads text features, not words: give one array of shape "
            f"{wanted} (prompts, tokens, width) for its prompts with --text_features FILE.npy; "
            f"given: {None if features is None else features.shape}."
        )
    return features.astype(np.float32)


FIELDS = {"images": "image", "labels": "labels"}
"""Kinds of given inputs -> the batch field they are."""


def given_rows(given: Given | None, indices: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """The known batch fields of some pairs; item ``index mod n`` belongs to pair ``index``."""
    if given is None:
        return {}
    rows = [given.load(int(i) % len(given), size) for i in indices]
    return {FIELDS[given.kind]: np.stack(rows)}


def made_batches(
    make: Callable,
    text: np.ndarray | None,
    *,
    seed: int,
    start: int,
    stop: int,
    known: Callable[[np.ndarray], dict[str, Any]] = lambda indices: {},
    needed: Callable[[np.ndarray], np.ndarray] = lambda indices: indices >= 0,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """``(indices, pairs)`` in index order, made one batch ahead of the reader.

    Of several processes each gets every so-many-th batch; all get the same number of them, the last
    of which may be empty.

    Args:
      known: the given fields of some indices.
      needed: which of some indices are wanted; batches without any are not made.
    """

    def begin(first: int) -> Any:
        indices = np.arange(first, first + make.batch)
        rows = None if text is None else text[indices % len(text)]
        return indices, make(rows, seed, indices, known(indices))

    def wanted(indices: np.ndarray) -> np.ndarray:
        return needed(indices) & (indices >= start) & (indices < stop)

    # from a multiple of the batch on: a resumed run makes the same batches as a straight one
    starts = range(start - start % make.batch, stop, make.batch)
    everyones = [i for i in starts if wanted(np.arange(i, i + make.batch)).any()]
    firsts = everyones[jax.process_index() :: jax.process_count()]
    ahead = begin(firsts[0]) if firsts else None
    for n in range(-(-len(everyones) // jax.process_count())):
        if n == len(firsts):
            yield np.arange(0), {}
            return
        indices, pairs = ahead
        ahead = begin(firsts[n + 1]) if n + 1 < len(firsts) else None
        keep = wanted(indices)
        yield indices[keep], {k: np.asarray(v)[keep] for k, v in pairs.items()}


def sample(
    workdir: Path,
    out: Path,
    *,
    num: int | None = None,
    prompts: Sequence[str] | None = None,
    features: np.ndarray | None = None,
    given: Given | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    per_device: int = PER_DEVICE,
    absorb: int = 0,
    min_instance: int = 16,
    more: Sequence[str] = (),
    filters: Filters | None = None,
) -> dict[str, Any]:
    """Generates ``num`` pairs into ``out`` and returns what the last line reports.

    Args:
      num: default: one pair for each given input, else 64; beyond the inputs they come again,
        with other noise.
      prompts: repeated in order; when not given, the inputs' captions if they have any, else the
        first captions of the training data.
      features: of the prompts, for a run whose text is precomputed features.
      given: label maps or images to start from.
      absorb: regions of fewer pixels are merged into their surroundings (0: off).
      min_instance: of panoptic results, parts of instances with fewer pixels are merged likewise.
      more: further pictures to write, names of ``MORE``.
      filters: what a pair must have; one that has not is listed without files, and counts.
    """
    run, filters = load_run(workdir), filters or Filters()
    system = with_options(run.system, steps=steps, guidance=guidance)
    try:
        system.check_condition({} if given is None else {FIELDS[given.kind]: None})
    except ValueError as error:
        hint = "On the command line: --given annotations=DIR or --given images=DIR."
        raise UserError(f"{error} {hint}") from error
    num = num or (64 if given is None else len(given))
    prompts = list(prompts or _captions(given) or run.info.captions or ("",))
    settings = {
        "checkpoint_step": run.step,
        "checkpoint_digest": run.digest,
        "seed": seed,
        "steps": system.solver.steps,
        "guidance": {k: s.guidance for k, s in system.streams.items()},
        "per_device_batch": per_device,
        "absorb": absorb,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    }
    if panoptic(system):
        settings["min_instance"] = min_instance
    if given is not None:
        settings["given"] = given.fingerprint()
    if more:
        settings["more"] = sorted(more)
    if filters != Filters():
        settings["filters"] = dataclasses.asdict(filters)
    writer = RoundWriter(out, run.info.classes, settings)
    text = text_rows(run, prompts, features)
    make = generator(run, system, per_device=per_device)
    bar = tqdm(
        total=num,
        initial=min(writer.start, num),
        unit="pair",
        desc="sampling",
        dynamic_ncols=True,
        disable=not distributed.is_first(),
    )
    made = made_batches(
        make,
        text,
        seed=seed,
        start=writer.start,
        stop=num,
        known=lambda indices: given_rows(given, indices, system.size),
        needed=writer.needed,
    )
    with bar:
        for indices, pairs in made:
            for row, index in enumerate(indices.tolist()):
                pair = cleaned(
                    {k: v[row] for k, v in pairs.items()},
                    run.info.classes,
                    absorb=absorb,
                    min_instance=min_instance,
                )
                confidence = float(pair["confidence"].mean(dtype=np.float64))
                facts = {"seed": seed, "confidence": round(confidence, 6)}
                name = None
                if given is not None:
                    facts["given"] = given.ids[index % len(given)]
                    name = _name(given, index)
                prompt, reason = prompts[index % len(prompts)], filters.reason(pair)
                if reason:
                    bar.update(writer.reject(index, prompt, facts, reason, name=name))
                    continue
                listed = writer.write(
                    index,
                    prompt,
                    pair["image"],
                    pair["labels"],
                    facts,
                    pair.get("segments"),
                    name=name,
                    more={k: MORE[k](pair, run.info.classes) for k in more},
                )
                bar.update(listed)
            bar.update(writer.end_round())

    def finish() -> str:
        pairs = writer.pairs
        pairs.close()
        counts = {"pairs": pairs.done, "made_now": pairs.done - writer.there}
        counts |= {"rejected": rejections(pairs.lines)} if filters != Filters() else {}
        grid = contact_sheet(out, pairs, run)
        return json.dumps(counts | {"out": str(out), "grid": str(grid)})

    return json.loads(distributed.from_first(finish))


def cleaned(
    pair: dict[str, np.ndarray], classes: Classes, *, absorb: int, min_instance: int
) -> dict[str, np.ndarray]:
    """A generated pair after clean-up of its mask and its instances."""
    labels = pair["labels"]
    if absorb:
        labels = masks.absorb(labels, absorb)
    if "segments" not in pair:
        return pair | {"labels": labels}
    labels, segments = instances.clean(
        labels, pair["segments"], classes.isthing, min_size=min_instance
    )
    return pair | {"labels": labels, "segments": segments}


def _captions(given: Given | None) -> list[str]:
    """A prompt for every given input; none if no input has a caption."""
    found = [next(iter(c), "") for c in given.captions] if given is not None else []
    return found if any(found) else []


def _name(given: Given, index: int) -> str:
    """The name of a pair made from an input: the input's, and a number from the second on."""
    again, item = divmod(index, len(given))
    return given.ids[item] + (f"-{again + 1}" if again else "")


def _overlay(pair: dict[str, np.ndarray], classes: Classes) -> np.ndarray:
    segments = pair.get("segments")
    return viz.overlay(pair["image"], pair["labels"], classes, segments=segments)


def _confidence(pair: dict[str, np.ndarray], classes: Classes) -> np.ndarray:
    return np.round(255 * pair["confidence"]).astype(np.uint8)


MORE = {"overlay": _overlay, "confidence": _confidence}
"""Further pictures of a pair, (pair, classes) -> uint8, by the name of their folder."""


def contact_sheet(out: Path, writer: PairWriter, run: Run, count: int = 32) -> Path:
    """``OUT/grid.png``: the first pairs as image, mask and overlay with their prompts."""
    lines = [line for line in writer.lines if "rejected" not in line][:count]
    images, labels, segments = [], [], []
    for line in lines:
        images.append(np.asarray(Image.open(out / line["image"])))
        values = np.asarray(Image.open(out / line["annotation"])).astype(np.int16)
        labels.append(np.where(values == FILE_VOID, VOID, values))
        if "panoptic" in line:
            path = out / line["panoptic"]
            segments.append(decode_segment_ids(path.read_bytes(), str(path)))
    prompts = [line["prompt"] for line in lines]
    sheet = viz.pair_sheet(
        images, labels, run.info.classes, captions=prompts, segments=segments or None
    )
    with writer.explained(out / "grid.png"):
        viz.save_png(out / "grid.png", sheet)
    return out / "grid.png"
