"""What the networks of both autoencoders are made of: a 3 x 3 convolution and its initialiser."""

from collections.abc import Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax.rng import flat
from jointseg_jax.types import Array, Params

FLOAT32 = np.dtype("float32")


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in), which torch's layers use for kernel and bias alike."""

    def initialise(key: Array, shape: Sequence[int], dtype: np.dtype | type = jnp.float32) -> Array:
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return flat(initialise)


def conv(
    x: Array, features: int, name: str, dtype: np.dtype, *, stride: int = 1, bias: bool = True
) -> Array:
    """3 x 3 convolution with one pixel of zeros on every side, also at stride 2."""
    start = uniform_fan_in(9 * x.shape[-1])
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=((1, 1), (1, 1)),  # not "SAME": at stride 2 that pads one side only
        use_bias=bias,
        dtype=dtype,
        kernel_init=start,
        bias_init=start,
        name=name,
    )(x)  # [b, h / stride, w / stride, features]


def apply(module: nn.Module, params: Params, x: Array) -> Array:
    """The output of a network without state: Linen's ``apply`` is typed for those with state."""
    return cast(Array, module.apply({"params": params}, x))
