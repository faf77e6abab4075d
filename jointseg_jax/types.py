"""Words and letters that mean one thing everywhere in the package.

Axis letters (long form in annotations, ``Float[Array, "batch height width channels"]``):

| letter | axis | letter | axis |
|---|---|---|---|
| b | batch | n | tokens |
| h, w | height, width (pixels or latent cells) | d | width of the network |
| c | channels | l | text length (words) |

Conventions:

* arrays are NHWC; ``t`` lies in [0, 1] with 0 = data and 1 = source (noise, or the other data end);
* images are uint8 [0, 255] on the host and on the wire, float32 [-1, 1] inside a system;
* label maps are integers, ``0 .. classes-1``, with ``VOID`` where nothing is annotated.
  The file value 255 exists only at the file border (``data/`` readers and ``generation/`` writers).

| source | its clean end | its noise end | our t |
|---|---|---|---|
| U-ViT, UniDiffuser, PDM | n = 0 | n = 1000 (uses abar_n) | n / 1000 |
| diffusers, JoDiffusion | label 0 (uses abar_1) | label 999 (uses abar_1000) | (label + 1) / 1000 |
| SemFlow | t = 0 image | t = 1 mask | t |
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np

VOID = -1
"""Label of a pixel without annotation, inside the package (int16 / int32)."""

FILE_VOID = 255
"""Value that stands for ``VOID`` in 8-bit label files."""

SEED_LIMIT = 2**32 - 1
"""The largest seed: JAX keeps 32 bits of a larger one, so that it would be the seed of another."""

Array = jax.Array
AnyArray = jax.Array | np.ndarray
"""What functions take that convert to a JAX array themselves."""

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
"""Of functions that compute in the library their argument is from: numpy in, numpy out."""

Streams = Mapping[str, jax.Array]
"""Arrays keyed by stream name, for example ``{"image": ..., "mask": ...}``."""

Params = Mapping[str, Any]
"""A (possibly empty) nested mapping of parameter arrays."""


class UserError(Exception):
    """A mistake the user can fix: the launchers print its text and exit with status 2."""


def require(name: str, value: object, holds: bool, rule: str, change: str = "") -> None:
    """The one check of a field's value: ``NAME = VALUE; it must be RULE. CHANGE``.

    Args:
      name: what the value is, with what it belongs to where that is not clear ("bits codec: pool").
      change: a sentence that says where to change it.

    Raises:
      ValueError: unless ``holds``; what builds objects from configs adds the config path.
    """
    if not holds:
        raise ValueError(f"{name} = {value!r}; it must be {rule}.{f' {change}' if change else ''}")


def require_seed(name: str, value: object) -> None:
    """``require`` for a seed, so that no two seeds draw the same numbers.

    Raises:
      ValueError: it is no whole number in 0..2^32 - 1.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    holds = whole and 0 <= int(cast(int, value)) <= SEED_LIMIT
    require(name, value, holds, f"a whole number, 0 to {SEED_LIMIT} (32 bits)")


def require_one_of(name: str, value: object, allowed: Collection[object], change: str = "") -> None:
    """``require`` for a value out of a list, which the message then shows."""
    require(name, value, value in allowed, "one of " + ", ".join(map(repr, allowed)), change)


def require_values(where: str, holds: bool, rule: str, **values: object) -> None:
    """``require`` for a rule in words, often over several values: ``WHERE: NAME=VALUE, ..: RULE``.

    Args:
      rule: what must hold, and what to change where.
    """
    if not holds:
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"{where}: {given}: {rule}")
