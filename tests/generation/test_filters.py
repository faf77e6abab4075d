"""G8: what is rejected depends on the pair alone, is counted, and leaves the others as they are."""

import json

import numpy as np
import pytest

from jointseg_jax.data.sources.scenes import Scenes
from jointseg_jax.generation.filters import Filters, rejections
from jointseg_jax.generation.rounds import RoundWriter
from jointseg_jax.types import VOID, UserError

SCENES = Scenes(size=32, count=8)


def pair(labels, confidence=0.75):
    return {"labels": np.array(labels, np.int32), "confidence": np.full((2, 2), confidence)}


@pytest.mark.parametrize(
    ("fields", "labels", "reason"),
    [
        ({}, [[0, 0], [0, 0]], ""),
        ({"min_confidence": 0.75}, [[0, 0], [0, 0]], ""),
        ({"min_confidence": 0.8}, [[0, 0], [0, 0]], "min_confidence: 0.7500 < 0.8"),
        ({"min_classes": 2}, [[0, 0], [0, VOID]], "min_classes: 1 < 2"),
        ({"min_classes": 2}, [[0, 0], [3, VOID]], ""),
        ({"max_share": 0.5}, [[0, 0], [3, VOID]], "max_share: 0.6667 > 0.5"),
        ({"max_share": 0.5}, [[0, 0], [3, 1]], ""),
        ({"max_share": 0.5}, [[VOID, VOID], [VOID, VOID]], "max_share: 1.0000 > 0.5"),
    ],
)
def test_verdicts(fields, labels, reason):
    assert Filters(**fields).reason(pair(labels)) == reason


@pytest.mark.parametrize(
    "fields", [{"min_confidence": 1.5}, {"max_share": -0.1}, {"min_classes": -1}]
)
def test_bounds_that_are_none(fields):
    with pytest.raises(UserError, match=r"ERROR \[flags\] filters: "):
        Filters(**fields)


def make(folder, numbers, count):
    """Pairs of which those in ``numbers`` are rejected."""
    writer = RoundWriter(folder, SCENES.classes, {})
    for i in range(writer.start, count):
        r = SCENES[i]
        if i in numbers:
            writer.reject(i, r["captions"][0], {"seed": 0}, "min_classes: 1 < 2")
        else:
            writer.write(i, r["captions"][0], r["image"], r["labels"], {"seed": 0})
    return writer.pairs


def test_rejected_pairs_are_listed_and_counted_whatever_the_sittings(tmp_path):
    whole = make(tmp_path / "one", {0, 2}, 4)
    make(tmp_path / "two", {0, 2}, 1)
    make(tmp_path / "two", {0, 2}, 3)
    again = make(tmp_path / "two", {0, 2}, 4)
    assert again.lines == whole.lines and rejections(whole.lines) == {"min_classes": 2}
    names = [f"{i:08d}.png" for i in (1, 3)]
    assert sorted(p.name for p in (tmp_path / "two/images").iterdir()) == names
    first = json.loads((tmp_path / "two/manifest.jsonl").read_text().splitlines()[0])
    assert first["rejected"] == "min_classes: 1 < 2" and "image" not in first
