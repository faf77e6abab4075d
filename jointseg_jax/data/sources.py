"""The sources of records, by the name that configs use."""

from jointseg_jax.data.arrayrecord import ArrayRecords
from jointseg_jax.data.folders import Folders
from jointseg_jax.data.scenes import Scenes
from jointseg_jax.data.tfds import TFDS

SOURCES = {"scenes": Scenes, "folders": Folders, "arrayrecord": ArrayRecords, "tfds": TFDS}
"""Source by name, for ``build``."""
