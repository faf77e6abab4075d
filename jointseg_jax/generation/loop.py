"""The sampling loop: batches over all devices, every pair a function of (seed, index) alone.

1. indices ``i .. i + B`` -> keys ``sample_keys(seed, index)``, prompts ``prompts[index mod n]``
2. one jitted call: solver, decode, uint8; the next batch is dispatched before this one is written
3. host: mask clean-up, files, manifest

The batch is the same at every call (a short last one is padded), so there is one compilation.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jointseg_jax import compose, masks, pictures, sharding
from jointseg_jax.generation.writer import PairWriter
from jointseg_jax.systems.joint import Joint
from jointseg_jax.systems.keys import sample_keys
from jointseg_jax.training.restore import Run, load_run
from jointseg_jax.types import FILE_VOID, VOID, UserError

PER_DEVICE = 16


def with_options(system: Joint, *, steps: int | None, guidance: float | None) -> Joint:
    """The system with another number of solver steps, or one guidance scale for all streams."""
    if not isinstance(system, Joint):
        raise UserError("this workdir holds a codec; pairs are sampled from a `joint` run.")
    kinds = {k: s.codec.kind for k, s in system.streams.items()}
    if not {"image", "labels"} <= set(kinds.values()):
        raise UserError(
            f"the streams of this run decode to {kinds}; sampling writes an image and its labels. "
            "A run on cached latents needs an image codec that can decode them in their stead."
        )
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


def generator(run: Run, system: Joint, *, per_device: int = PER_DEVICE) -> Callable:
    """``make(text, seed, indices) -> pairs`` on the device, for exactly ``make.batch`` rows."""
    mesh = sharding.make_mesh((-1, 1, 1))
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    params = jax.device_put(run.params, everywhere)
    frozen = jax.device_put(run.frozen, everywhere)

    @jax.jit
    def pairs(params: Any, frozen: Any, text: Any, seed: jax.Array, indices: jax.Array) -> Any:
        made = system.generate(params, frozen, text, sample_keys(seed, indices))
        return jax.lax.with_sharding_constraint(made, rows)

    def make(text: np.ndarray | None, seed: int, indices: np.ndarray) -> Any:
        placed = jax.device_put((text, indices.astype(np.uint32)), rows)
        with jax.set_mesh(mesh):
            return pairs(params, frozen, placed[0], jnp.uint32(seed), placed[1])

    make.batch = per_device * len(jax.devices())
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
    tokenizer = compose.tokenizer(run.config, run.facts.vocabulary)
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


def made_batches(
    make: Callable, text: np.ndarray | None, *, seed: int, start: int, stop: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """``(indices, pairs)`` in index order, made one batch ahead of the reader."""

    def begin(first: int) -> Any:
        indices = np.arange(first, first + make.batch)
        rows = None if text is None else text[indices % len(text)]
        return indices, make(rows, seed, indices)

    # from a multiple of the batch on: a resumed run makes the same batches as a straight one
    firsts = list(range(start - start % make.batch, stop, make.batch))
    ahead = begin(firsts[0]) if firsts else None
    for n in range(len(firsts)):
        indices, pairs = ahead
        ahead = begin(firsts[n + 1]) if n + 1 < len(firsts) else None
        keep = (indices >= start) & (indices < stop)
        yield indices[keep], {k: np.asarray(v)[keep] for k, v in pairs.items()}


def sample(
    workdir: Path,
    out: Path,
    *,
    num: int,
    prompts: Sequence[str] | None = None,
    features: np.ndarray | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    per_device: int = PER_DEVICE,
    absorb: int = 0,
) -> dict[str, Any]:
    """Generates ``num`` pairs into ``out`` and returns what the last line reports.

    Args:
      prompts: repeated in order; the first captions of the training data when not given.
      features: of the prompts, for a run whose text is precomputed features.
      absorb: regions of fewer pixels are merged into their surroundings (0: off).
    """
    run = load_run(workdir)
    system = with_options(run.system, steps=steps, guidance=guidance)
    prompts = list(prompts or run.facts.captions or ("",))
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
    writer = PairWriter(out, run.facts.classes, settings)
    start = writer.done
    text = text_rows(run, prompts, features)
    make = generator(run, system, per_device=per_device)
    bar = tqdm(total=num, initial=min(start, num), unit="pair", desc="sampling", dynamic_ncols=True)
    with bar:
        for indices, pairs in made_batches(make, text, seed=seed, start=start, stop=num):
            for row, index in enumerate(indices):
                labels = pairs["labels"][row]
                if absorb:
                    labels = masks.absorb(labels, absorb)
                confidence = float(pairs["confidence"][row].mean(dtype=np.float64))
                facts = {"seed": seed, "confidence": round(confidence, 6)}
                prompt = prompts[index % len(prompts)]
                writer.write(int(index), prompt, pairs["image"][row], labels, facts)
                bar.update()
    writer.close()
    grid = contact_sheet(out, writer, run)
    return {
        "pairs": writer.done,
        "made_now": writer.done - start,
        "out": str(out),
        "grid": str(grid),
    }


def contact_sheet(out: Path, writer: PairWriter, run: Run, count: int = 32) -> Path:
    """``OUT/grid.png``: the first pairs as image, mask and overlay with their prompts."""
    lines = writer.lines[:count]
    images, labels = [], []
    for line in lines:
        images.append(np.asarray(Image.open(out / line["image"])))
        values = np.asarray(Image.open(out / line["annotation"])).astype(np.int16)
        labels.append(np.where(values == FILE_VOID, VOID, values))
    prompts = [line["prompt"] for line in lines]
    sheet = pictures.pair_sheet(images, labels, run.facts.classes, captions=prompts)
    pictures.save_png(out / "grid.png", sheet)
    return out / "grid.png"
