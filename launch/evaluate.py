"""Measures a trained workdir; the last line of output is one JSON object.

  python launch/evaluate.py --workdir runs/quickstart --num 256

A joint run: reconstruction mIoU of its annotation codec, alignment of generated pairs (mIoU between
a judge's labels of the generated image and the generated mask, with its chance level), MCD. A codec
run: reconstruction mIoU, mIoU of edge pixels, worst class, on the whole validation split.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from jointseg_jax import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
NUM = flags.DEFINE_integer("num", 256, "Generated pairs to judge (joint runs).", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    """Evaluates."""
    cli.use_compile_cache()
    from jointseg_jax.evaluation.loop import evaluate

    cli.last_line(evaluate(Path(WORKDIR.value), num=NUM.value, seed=SEED.value))


if __name__ == "__main__":
    cli.run(main)
