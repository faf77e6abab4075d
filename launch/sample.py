"""Generates image-annotation pairs from a trained workdir.

  python launch/sample.py --workdir runs/quickstart --out pairs --num 64
  python launch/sample.py --workdir runs/quickstart --out pairs --num 64 --prompts prompts.txt \\
      --seed 7 --steps 30 --guidance 2

Writes OUT/images/ID.png, OUT/annotations/ID.png (palette PNG: pixel = class index, 255 = void),
OUT/manifest.jsonl (prompt, seed, size, confidence, SHA-256 of both files) and OUT/grid.png. Pair i
depends on (seed, i) alone; an interrupted run goes on with the same command and ends with the same
bytes. The last line of output is one JSON object.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from jointseg_jax import cli
from jointseg_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained `joint` run.")
OUT = flags.DEFINE_string("out", None, "Folder for the pairs.")
NUM = flags.DEFINE_integer("num", 64, "How many pairs.", lower_bound=1)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "Text file, one prompt a line; default: captions of the training data."
)
FEATURES = flags.DEFINE_string(
    "text_features", None, ".npy of the prompts' features, for runs that read features."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
STEPS = flags.DEFINE_integer("steps", None, "Solver steps; default: the config's.", lower_bound=1)
GUIDANCE = flags.DEFINE_float(
    "guidance",
    None,
    "Scale s of uncond + s (cond - uncond) for every stream; 1 is off.",
    lower_bound=0.0,
)
ABSORB = flags.DEFINE_integer(
    "absorb",
    0,
    "Merge label regions of fewer pixels into their surroundings; 0 is off.",
    lower_bound=0,
)
PER_DEVICE = flags.DEFINE_integer("per_device", 16, "Pairs per device and batch.", lower_bound=1)
flags.mark_flags_as_required(["workdir", "out"])


def main() -> None:
    """Samples."""
    cli.use_compile_cache()
    from jointseg_jax.generation.loop import sample

    report = sample(
        Path(WORKDIR.value),
        Path(OUT.value),
        num=NUM.value,
        prompts=_prompts(PROMPTS.value),
        features=_features(FEATURES.value),
        seed=SEED.value,
        steps=STEPS.value,
        guidance=GUIDANCE.value,
        per_device=PER_DEVICE.value,
        absorb=ABSORB.value,
    )
    cli.last_line(report)


def _prompts(path: str | None) -> list[str] | None:
    if path is None:
        return None
    if not Path(path).is_file():
        raise UserError(
            f"ERROR [flags] --prompts={path}: no such file; give a text file, one prompt a line."
        )
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"ERROR [flags] --prompts={path}: no prompt in it; write one a line.")
    return prompts


def _features(path: str | None) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"ERROR [flags] --text_features={path}: {error}.") from error


if __name__ == "__main__":
    cli.run(main)
