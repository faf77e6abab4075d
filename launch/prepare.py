"""Checks a data set, reports what is in it, and turns it into shards for training.

  python launch/prepare.py --source folders --root data/camvid --split train --out shards/camvid
  python launch/prepare.py --source voc --root VOCdevkit/VOC2012 --split trainaug --out shards/voc
  python launch/prepare.py --source ade20k --root ADEChallengeData2016 --split training --out O
  python launch/prepare.py --source coco_panoptic --root coco --split val2017 --out O --threads 16
  python launch/prepare.py --source coco_stuff --root cocostuff --split train2017 --out O
  python launch/prepare.py --source cityscapes --root cityscapes --split train --out O
  python launch/prepare.py --source celebamask_hq_parts --root CelebAMask-HQ --split train --out O
  python launch/prepare.py --source tfds --root ~/tensorflow_datasets/oxford_iiit_pet/4.0.0 \\
      --split train --out O --set classes=pets.json --set first_label=1
  python launch/prepare.py --source scenes --split train --out O --set size=64 --set count=2000

Every record is read and checked: truncated or foreign files, missing images or masks, sizes that
differ, labels out of range, masks in colours, turned pictures, ids that clash. The report has the
class histogram, sizes, captions, void, classes never seen, equal images and each bad sample with
its file, the cause and the remedy. Good records are written, bad ones left out; with --strict one
bad sample is enough to write nothing and exit with status 2.

How each layout keeps its files, and what its label values mean, is at the top of
jointseg_jax/data/sources/layouts.py. --set gives any field of the source: void=[0,255] (file
values without annotation), label_map=[[7,0],[8,1]] (file value, class), colour_map=[[[128,0,0],1]]
(colour, file value), orientation="apply" (turn pictures as their EXIF says), classes="cityscapes"
or a path.

Writes OUT/SPLIT-*.arrayrecord, OUT/dataset.json, OUT/classes.json, OUT/report.json. Several splits
share a folder. To train on it: --config.data.train.name=arrayrecord --config.data.train.folder=OUT.
The last line of output is one JSON object.
"""

from __future__ import annotations

import functools
import json

from absl import flags
from tqdm import tqdm

from jointseg_jax import cli
from jointseg_jax.build import SOURCES
from jointseg_jax.data.prepare import prepare
from jointseg_jax.data.records import Source
from jointseg_jax.data.sources.layouts import LAYOUTS
from jointseg_jax.specs import make
from jointseg_jax.types import UserError

KINDS = (*LAYOUTS, "tfds", "scenes")

SOURCE = flags.DEFINE_enum("source", None, KINDS, "Layout of the data set, tfds, or scenes.")
ROOT = flags.DEFINE_string("root", None, "Folder of the data set (not for scenes).")
SPLIT = flags.DEFINE_string("split", None, "Split to read, and its name in the output.")
OUT = flags.DEFINE_string("out", None, "Folder for the shards.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the source, JSON or plain text.")
STRICT = flags.DEFINE_boolean("strict", False, "Write nothing unless every record is good.")
SHARDS = flags.DEFINE_integer(
    "shards", None, "Number of files; one per 1024 records when not given.", lower_bound=1
)
LIMIT = flags.DEFINE_integer("limit", None, "At most this many records.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 4, "Threads that read.", lower_bound=1)
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace this split in --out.")
flags.mark_flags_as_required(["source", "split", "out"])


def main() -> None:
    """Prepares one split."""
    report = prepare(
        source(),
        OUT.value,
        split=SPLIT.value,
        strict=STRICT.value,
        shards=SHARDS.value,
        limit=LIMIT.value,
        threads=THREADS.value,
        overwrite=OVERWRITE.value,
        progress=functools.partial(tqdm, unit="record", disable=None),
        show=lambda report: print(report.table(), flush=True),
    )
    print(f"{len(report.good)} records of split {SPLIT.value!r} are in {OUT.value}")
    cli.last_line({"out": OUT.value, "good": len(report.good), "bad": len(report.bad)})


def source() -> Source:
    """Builds the source that the flags describe."""
    spec = {"split": SPLIT.value}
    if SOURCE.value in LAYOUTS:
        spec |= {"name": "folders", "layout": SOURCE.value, "strict": False, "root": needed_root()}
    elif SOURCE.value == "tfds":
        spec |= {"name": "tfds", "folder": needed_root()}
    else:
        spec |= {"name": SOURCE.value}
    return make(SOURCES, spec | dict(map(field, SET.value)), where="data")


def needed_root() -> str:
    """Returns --root, which every data set on disk needs."""
    if not ROOT.value:
        raise UserError(f"ERROR [flags] --source {SOURCE.value} needs --root, its folder.")
    return ROOT.value


def field(text: str) -> tuple[str, object]:
    """Reads one FIELD=VALUE; lists become tuples, which sources want."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"ERROR [flags] --set {text}: give FIELD=VALUE, such as --set void=[255].")
    try:
        return name, frozen(json.loads(value))
    except json.JSONDecodeError:
        return name, value


def frozen(value: object) -> object:
    """Returns JSON with tuples for lists."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    cli.run(main)
