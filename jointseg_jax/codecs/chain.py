"""Two codecs one after the other: labels become an image, the image becomes latents.

1. encode(labels) = second.encode(first.encode(labels)),
   decode(latents) = first.decode(second.decode(latents)).
2. The parameters are the second's; the first has none.
3. Each row's key is split in two, one for the first (a perturbation of colours) and one for the
   second.

With ``Pixels`` as the second, latents are the first's own.

Source: SemFlow (2405.20282), section 3.2 (pseudo masks through the image autoencoder).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int, Int32, Key

from jointseg_jax.types import Array, Params

AnyArray = Array | np.ndarray


@dataclass(frozen=True, kw_only=True)
class Chain:
    """An annotation codec without parameters whose latents an image codec takes as an image."""

    first: Any
    second: Any
    kind: ClassVar[str] = "labels"

    def __post_init__(self) -> None:
        for name, kind in (("first", "labels"), ("second", "image")):
            found = getattr(self, name).kind
            if found != kind:
                raise ValueError(
                    f"chain codec: `{name}` is a codec of {found}; it must be one of {kind}. "
                    f"Change `{name}` in the codec config."
                )
        if jax.eval_shape(lambda: self.first.init(jax.random.key(0))):
            raise ValueError(
                f"chain codec: `first` is {type(self.first).__name__}, which has parameters; it "
                "must have none, such as palette. Change `first` in the codec config."
            )

    def init(self, key: Key[Array, ""]) -> Params:
        """The parameters of the second."""
        return self.second.init(key)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """That of the second, for an image of the size of the first's latents."""
        return self.second.latent_shape(self.first.latent_shape(size)[:2])

    def encode(
        self,
        params: Params,
        labels: Int[AnyArray, "batch height width"],
        *,
        keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch rows columns c"]:
        """The second's latents of the first's."""
        first_keys, second_keys = (None, None) if keys is None else _two_keys(keys)
        image = self.first.encode({}, labels, keys=first_keys)
        return self.second.encode(params, image, keys=second_keys)

    def decode(
        self, params: Params, latents: Float[AnyArray, "batch rows columns c"]
    ) -> Int32[Array, "batch height width"]:
        """What the first reads in the image that the second gives."""
        return self.first.decode({}, self.second.decode(params, latents))

    def decode_with_confidence(
        self, params: Params, latents: Float[AnyArray, "batch rows columns c"]
    ) -> tuple[Int32[Array, "batch height width"], Float[Array, "batch height width"]]:
        """The same, and how sure the first is of its reading."""
        return self.first.decode_with_confidence({}, self.second.decode(params, latents))


def _two_keys(keys: Key[Array, " batch"]) -> tuple[Array, Array]:
    pairs = jax.vmap(jax.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]
