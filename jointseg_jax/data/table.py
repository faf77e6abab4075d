"""The names under which configs choose sources and transforms."""

from jointseg_jax.data.arrayrecord import ArrayRecords
from jointseg_jax.data.folders import Folders
from jointseg_jax.data.scenes import Scenes
from jointseg_jax.data.tfds import TFDS
from jointseg_jax.data.transforms import TRANSFORMS

SOURCES = {"scenes": Scenes, "folders": Folders, "arrayrecord": ArrayRecords, "tfds": TFDS}

__all__ = ["SOURCES", "TRANSFORMS"]
