"""A class that may have been read as void is said: in reports, and where training starts."""

import logging

import numpy as np
import pytest
from PIL import Image

from jointseg_jax.config import ReadConfig
from jointseg_jax.data.audit import scan
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.sources.folders import Folders
from jointseg_jax.data.transforms import Resize


def made(root, mask, names):
    """A source of four pictures with one mask, in the layout ``folders``."""
    for folder in ("images", "annotations"):
        (root / folder / "s").mkdir(parents=True)
    for key in "abcd":
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / f"images/s/{key}.png")
        Image.fromarray(mask.astype(np.uint8)).save(root / f"annotations/s/{key}.png")
    (root / "classes.json").write_text(
        '{"classes": [' + ", ".join(map('"{}"'.format, names)) + "]}"
    )
    return Folders(root=str(root), split="s")


def mask(*values):
    return np.repeat(values, 64 // len(values)).reshape(8, 8)


SAID = "'lesion' never occurs in 4 records, while 50.0 % of their pixels are void"


@pytest.mark.parametrize(
    ("values", "names", "said"),
    [
        ((0, 255), ("background", "lesion"), SAID),
        ((0, 1, 255, 255), ("background", "organ", "lesion"), SAID),
        ((0, 1), ("background", "lesion"), ""),  # all there
        ((0, 1, 255, 255), ("background", "lesion"), ""),  # void beside all classes
        ((0, 0), ("background", "lesion"), ""),  # not there, and nothing is void
    ],
)
def test_a_class_that_became_void_is_said(tmp_path, caplog, values, names, said):
    source = made(tmp_path, mask(*values), names)
    table = scan(source).table()
    assert ("WARNING" in table) == bool(said) and said in table
    with caplog.at_level(logging.WARNING, logger="jointseg_jax"):
        options = {"batch": 2, "seed": 0, "transforms": (Resize(size=8),)}
        batches(source, ReadConfig(threads=1, prefetch=1), **options).close()
    assert bool(caplog.text) == bool(said) and said in caplog.text
    assert not said or "\"255\": 'lesion'" in caplog.text
