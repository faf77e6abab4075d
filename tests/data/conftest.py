"""A small data set on disk in the ``folders`` layout, for tests to read and to spoil."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("sky", "road", "left eye", "right eye")


@dataclasses.dataclass(frozen=True)
class Disk:
    """A data set folder: ids ``a0 .. a5`` of 12x16 pixels in the split ``train``."""

    root: Path
    ids: tuple[str, ...]

    def image(self, key):
        return self.root / f"images/train/{key}.jpg"

    def labels(self, key):
        return self.root / f"annotations/train/{key}.png"

    @property
    def captions(self):
        return self.root / "captions/train.jsonl"


def painted(index):
    """Smooth image and four-class labels with some void, different for every index."""
    rows, columns = np.indices((12, 16))
    image = np.stack([rows * 20, columns * 15, 0 * rows + 40 * index], -1).astype(np.uint8)
    labels = ((rows + index) // 4 + columns // 8) % 4
    labels[:2, :3] = 255
    return image, labels.astype(np.int16)


@pytest.fixture
def disk(tmp_path):
    root = tmp_path / "set"
    data = Disk(root, tuple(f"a{i}" for i in range(6)))
    for folder in ("images/train", "annotations/train", "captions"):
        (root / folder).mkdir(parents=True)
    for index, key in enumerate(data.ids):
        image, labels = painted(index)
        Image.fromarray(image).save(data.image(key), quality=95)
        Image.fromarray(labels.astype(np.uint8)).save(data.labels(key))
    lines = [json.dumps({"id": key, "caption": f"number {key} of some"}) for key in data.ids]
    data.captions.write_text("\n".join(lines) + "\n")
    content = {"classes": list(NAMES), "ignore_label": 255, "swaps": [["left eye", "right eye"]]}
    (root / "classes.json").write_text(json.dumps(content))
    return data


@pytest.fixture
def paint():
    """The image and labels that stand behind id ``a<index>`` of ``disk``."""
    return painted
