"""Measures a trained workdir; the last line of output is one JSON object.

  python launch/evaluate.py --workdir runs/quickstart --num 256
  python launch/evaluate.py --workdir runs/codec --size 360x480

A joint run: reconstruction mIoU of its annotation codec, alignment of generated pairs (mIoU between
a judge's labels of the generated image and the generated mask, with its chance level), MCD. A codec
run: reconstruction mIoU, mIoU of edge pixels, worst class, on the whole validation split.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from jointseg_jax import cli
from jointseg_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
NUM = flags.DEFINE_integer("num", 256, "Generated pairs to judge (joint runs).", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
SIZE = flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH of validation maps for a codec run; default: the config's."
)
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    """Evaluates."""
    cli.use_compile_cache()
    from jointseg_jax.evaluation.loop import evaluate

    size = _size(SIZE.value)
    cli.last_line(evaluate(Path(WORKDIR.value), num=NUM.value, seed=SEED.value, size=size))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() for side in sides):
        raise UserError(f"ERROR [flags] --size={text}: give HEIGHTxWIDTH, as 360x480.")
    return int(sides[0]), int(sides[1])


if __name__ == "__main__":
    cli.run(main)
