"""Generates image-annotation pairs from a trained workdir.

  python launch/sample.py --workdir runs/quickstart --out pairs --num 64
  python launch/sample.py --workdir runs/quickstart --out pairs --num 64 --prompts prompts.txt \\
      --seed 7 --steps 30 --guidance 2
  python launch/sample.py --workdir runs/semflow --out read --given images=photos
  python launch/sample.py --workdir runs/semflow --out made --given annotations=maps --num 40

Writes OUT/images/ID.png, OUT/annotations/ID.png (palette PNG: pixel = class index, 255 = void),
OUT/manifest.jsonl (prompt, its unknown words, seed, size, confidence, SHA-256 of both files) and
OUT/grid.png; with
instance bits also OUT/panoptic/ID.png (RGB PNG of COCO segment ids). Pair i depends on (seed, i)
alone; an interrupted run (exit status 75 after SIGTERM) goes on with the same command and ends with
the same bytes. The last line of output is one JSON object. Several processes (as in
launch/train.py, with --out on a file system that they share) divide the pairs among them and leave
the same folder as one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from jointseg_jax import cli
from jointseg_jax.types import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained `joint` run.", required=True)
OUT = flags.DEFINE_string("out", None, "Folder for the pairs.", required=True)
NUM = flags.DEFINE_integer(
    "num",
    None,
    "How many pairs; default: 64, or one for each given input. Beyond the inputs they come again, "
    "with other noise.",
    lower_bound=1,
)
GIVEN = flags.DEFINE_string(
    "given",
    None,
    "annotations=DIR or images=DIR: your label maps (PNG of class indices, 255 = void) or pictures "
    "to start from. A run trained on given maps needs annotations; a bridge takes either.",
)
LAYOUT = flags.DEFINE_string(
    "layout", "plain", "How DIR is laid out: plain (a folder of files), folders, voc, ade20k, ..."
)
SPLIT = flags.DEFINE_string("split", "", "Split of DIR, for layouts that have splits.")
FIT = flags.DEFINE_enum(
    "fit", "crop", ["crop", "stretch"], "How given inputs come to the model's size."
)
DIRECTION = flags.DEFINE_enum(
    "direction",
    None,
    ["segment", "synthesize"],
    "Of a bridge: checked against what is given (images are segmented, annotations synthesized).",
)
WRITE = flags.DEFINE_list(
    "write",
    None,
    "Further pictures per pair: overlay, confidence. Default: both for given images, else none.",
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "Text file, one prompt a line; default: captions of the training data."
)
FEATURES = flags.DEFINE_string(
    "text_features", None, ".npy of the prompts' features, for runs that read features."
)
SEED = cli.define_seed_flag()
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
MIN_INSTANCE = flags.DEFINE_integer(
    "min_instance",
    16,
    "Of panoptic results: fewest pixels of a connected part of an instance.",
    lower_bound=0,
)
MIN_CONFIDENCE = flags.DEFINE_float(
    "min_confidence",
    0.0,
    "A pair of less mean confidence is rejected: its manifest line says why, it has no files. "
    "--num counts it.",
    lower_bound=0.0,
    upper_bound=1.0,
)
MIN_CLASSES = flags.DEFINE_integer(
    "min_classes", 0, "Likewise a pair whose map has fewer classes.", lower_bound=0
)
MAX_SHARE = flags.DEFINE_float(
    "max_share",
    1.0,
    "Likewise a pair whose map is one class to a larger part.",
    lower_bound=0.0,
    upper_bound=1.0,
)
PER_DEVICE = flags.DEFINE_integer("per_device", 16, "Pairs per device and batch.", lower_bound=1)
cli.define_process_flags()


def main() -> None:
    """Samples."""
    cli.start()
    from jointseg_jax.data.given import given_images, given_labels
    from jointseg_jax.generation.filters import Filters
    from jointseg_jax.generation.sample import EXTRA_IMAGES, SampleOptions, sample
    from jointseg_jax.training.preemption import ExitOnSigterm
    from jointseg_jax.training.workdir import load_info, load_run

    kind, folder = _given(GIVEN.value, DIRECTION.value)
    default = EXTRA_IMAGES if kind == "images" else ()
    extra = tuple(default if WRITE.value is None else WRITE.value)
    if set(extra) - set(EXTRA_IMAGES):
        names = ", ".join(EXTRA_IMAGES)
        raise UserError(f"ERROR [flags] --write={','.join(extra)}: known are {names}.")
    condition = None
    if kind == "images":
        condition = given_images(folder, layout=LAYOUT.value, split=SPLIT.value, mode=FIT.value)
    elif kind == "annotations":
        classes = load_info(Path(WORKDIR.value)).classes
        condition = given_labels(
            folder, classes, layout=LAYOUT.value, split=SPLIT.value, mode=FIT.value
        )
    with ExitOnSigterm():
        options = SampleOptions(
            num=NUM.value,
            prompts=_prompts(PROMPTS.value),
            features=_features(FEATURES.value),
            condition=condition,
            seed=SEED.value,
            steps=STEPS.value,
            guidance=GUIDANCE.value,
            per_device=PER_DEVICE.value,
            absorb=ABSORB.value,
            min_instance=MIN_INSTANCE.value,
            extra_images=extra,
            filters=Filters(
                min_confidence=MIN_CONFIDENCE.value,
                min_classes=MIN_CLASSES.value,
                max_share=MAX_SHARE.value,
            ),
        )
        report = sample(load_run(WORKDIR.value), Path(OUT.value), options)
    cli.last_line(report)


DIRECTIONS = {"segment": "images", "synthesize": "annotations"}


def _given(text: str | None, direction: str | None) -> tuple[str, Path]:
    """What is given and where it lies; an empty kind where nothing is."""
    kind, _, folder = (text or "").partition("=")
    if text is not None and (kind not in DIRECTIONS.values() or not folder):
        raise UserError(f"ERROR [flags] --given={text}: give annotations=DIR or images=DIR.")
    if direction is not None and kind != DIRECTIONS[direction]:
        raise UserError(
            f"ERROR [flags] --direction={direction} needs --given {DIRECTIONS[direction]}=DIR; "
            f"given: {text or 'nothing'}."
        )
    return kind, Path(folder)


def _prompts(path: str | None) -> list[str]:
    from jointseg_jax.data import files
    from jointseg_jax.data.records import BadSample

    if path is None:
        return []
    if not Path(path).is_file():
        raise UserError(
            f"ERROR [flags] --prompts={path}: no such file; give a text file, one prompt a line."
        )
    try:
        prompts = [line for _, line in files.lines(files.read_text(Path(path)))]
    except BadSample as problem:
        found = f"{problem.found}; {problem.expected}. {problem.remedy}"
        raise UserError(f"ERROR [flags] --prompts={problem.path}: {found}") from None
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
