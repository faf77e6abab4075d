"""The codecs of a config's system on the devices of this process, whole batches at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jointseg_jax import build, sharding
from jointseg_jax.rng import sample_keys
from jointseg_jax.systems.system import Encodable, Input
from jointseg_jax.training import pretrained
from jointseg_jax.types import Array, UserError


class Encoder:
    """From rows of a batch field to latents.

    Attributes:
      inputs: what the system reads of a batch.
      params: the codecs' parameters by the names of the inputs, ``{}`` or absent without any.
      batch: rows encoded at a time, over all devices.
    """

    def __init__(self, inputs: Mapping[str, Input], params: Mapping[str, Any], *, batch: int):
        """Makes one that encodes ``batch`` rows on each device."""
        self._mesh = sharding.own_mesh()
        self.inputs, self.batch = dict(inputs), batch * self._mesh.size
        self.params = jax.device_put(dict(params), sharding.replicated(self._mesh))
        self._compiled: dict[str, Callable[..., Array]] = {}

    @staticmethod
    def of(
        folder: Path, config: Mapping[str, Any], info: build.DatasetInfo, *, batch: int
    ) -> Encoder:
        """The encoder of a config whose trained codecs were gathered in a folder.

        Raises:
          UserError: the config's system has no codecs that stay as they are.
        """
        specs, params = pretrained.load(folder, config)
        system = build.system(config, info, specs)
        if not isinstance(system, Encodable):
            raise UserError(
                f"ERROR [encode] config.system.name: a system `{config['system']['name']}` trains "
                "its own codec, whose latents change with every step; give the config of a run "
                "that uses a trained codec."
            )
        return Encoder(system.inputs(), params, batch=batch)

    def shape(self, name: str, values: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        """The shape of one row of latents, of the fields of one row."""
        one, codec = values[self.inputs[name].field][None], self.inputs[name].codec
        return jax.eval_shape(codec.encode, self.params.get(name, {}), one).shape[1:]

    def draws(self, name: str, values: Mapping[str, np.ndarray]) -> bool:
        """Whether other keys give one row other latents."""
        rows = np.repeat(values[self.inputs[name].field][None], self.batch, axis=0)
        one, other = (np.asarray(self._run(name, rows, seed)) for seed in (0, 1))
        return not np.array_equal(one, other, equal_nan=True)

    def __call__(self, name: str, values: np.ndarray) -> list[Array]:
        """Starts to encode rows, in batches of which the last is filled up with its last row."""
        fill = np.repeat(values[-1:], -len(values) % self.batch, axis=0)
        whole = np.concatenate([values, fill])
        starts = range(0, len(whole), self.batch)
        return [self._run(name, whole[i : i + self.batch], 0) for i in starts]

    def _run(self, name: str, values: np.ndarray, seed: int) -> Array:
        rows = jax.device_put(values, sharding.batch_sharding(self._mesh))
        return self._program(name)(self.params.get(name, {}), rows, np.uint32(seed))

    def _program(self, name: str) -> Callable[..., Array]:
        if name not in self._compiled:
            codec, batch = self.inputs[name].codec, self.batch

            @jax.jit
            def encode(params: Any, values: Array, seed: Array) -> Array:
                keys = sample_keys(seed, jnp.arange(batch, dtype=jnp.uint32))
                return codec.encode(params, values, keys=keys).astype(jnp.float32)

            self._compiled[name] = encode
        return self._compiled[name]
