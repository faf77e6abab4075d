"""Measures a trained workdir; the last line of output is one JSON object.

  python launch/evaluate.py --workdir runs/quickstart --num 256
  python launch/evaluate.py --workdir runs/codec --size 360x480
  python launch/evaluate.py --workdir runs/semflow --steps 1,2,5,10,25

A joint run: reconstruction mIoU of its annotation codec, alignment of generated pairs (mIoU between
a judge's labels of the generated image and the generated mask, with its chance level), MCD. A codec
run: reconstruction mIoU, mIoU of edge pixels, worst class, on the whole validation split. A bridge:
segmentation mIoU, alignment of images made from validation maps, their diversity. --steps compares
numbers of solver steps.

Of the embedded scenes, which the oracle judges, a table comes before that line: do the pictures
hold the words of their prompts, can the shapes be named, how many fragments are there; with real
renders of the validation split and the level of chance beside each.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from jointseg_jax import cli, distributed
from jointseg_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.", required=True)
NUM = flags.DEFINE_integer(
    "num", 256, "Pairs to generate and judge (joint runs, bridges).", lower_bound=1
)
SEED = cli.define_seed_flag()
SIZE = flags.DEFINE_string(
    "size", None, "HEIGHTxWIDTH of validation maps for a codec run; default: the config's."
)
STEPS = flags.DEFINE_list(
    "steps", [], "Numbers of solver steps to compare, as 1,2,5,10,25; default: the config's."
)
REFINE = flags.DEFINE_integer(
    "refine",
    None,
    "Of a label autoencoder: gradient steps on each latent when encoding; default: the config's.",
    lower_bound=0,
)
cli.define_process_flags()


def main() -> None:
    """Evaluates."""
    cli.start()
    from jointseg_jax.evaluation.evaluate import evaluate
    from jointseg_jax.evaluation.scene_table import scene_tables
    from jointseg_jax.training.preemption import ExitOnSigterm

    size, steps = _size(SIZE.value), _steps(STEPS.value)
    workdir = Path(WORKDIR.value)
    with ExitOnSigterm():
        report = evaluate(
            workdir, num=NUM.value, seed=SEED.value, size=size, steps=steps, refine=REFINE.value
        )
    if distributed.is_first():
        print(scene_tables(report), end="")
    cli.last_line(report)


def _steps(words: list[str]) -> list[int]:
    if not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"ERROR [flags] --steps={','.join(words)}: give numbers, as 1,2,5,10,25.")
    return [int(word) for word in words]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdigit() for side in sides):
        raise UserError(f"ERROR [flags] --size={text}: give HEIGHTxWIDTH, as 360x480.")
    return int(sides[0]), int(sides[1])


if __name__ == "__main__":
    cli.run(main)
