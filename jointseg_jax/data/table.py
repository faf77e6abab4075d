"""The names under which configs choose sources and transforms."""

from jointseg_jax.data.scenes import Scenes
from jointseg_jax.data.transforms import TRANSFORMS

SOURCES = {"scenes": Scenes}

__all__ = ["SOURCES", "TRANSFORMS"]
