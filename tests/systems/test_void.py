"""D20: a map that is void all over costs no more than finite, and teaches nothing that is not."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jointseg_jax import build
from jointseg_jax.config import SystemConfig
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import DatasetInfo
from jointseg_jax.rng import row_keys
from jointseg_jax.types import VOID

PDM = Path(__file__).parents[2] / "configs/pdm.py"
SIZE, ROWS = 8, 2


@pytest.mark.thorough
def test_a_batch_of_void_has_a_finite_loss_and_gradient():
    config = runpy.run_path(str(PDM))["get_config"]("smoke").to_dict()
    config["system"] |= {"size": (SIZE, SIZE), "text": {"name": "words", "width": 8, "length": 4}}
    config["system"]["denoiser"] |= {"width": 8, "depth": 1, "heads": 1}
    known = DatasetInfo(Classes(names=("sky", "road", "car")), ("a",), ())
    system = build.system(SystemConfig.parse(config["system"]), known)
    rows = {
        "image": np.zeros((ROWS, SIZE, SIZE, 3), np.uint8),
        "labels": np.full((ROWS, SIZE, SIZE), VOID, np.int16),
        "text": np.zeros((ROWS, 4), np.int32),
    }
    batch = jax.tree.map(jnp.asarray, rows)

    @jax.jit
    def step(key):
        params = system.init(key)
        keys = row_keys(0, 0, jnp.arange(ROWS, dtype=jnp.uint32))
        return jax.value_and_grad(lambda p: system.loss(p, {}, batch, keys)[0])(params)

    loss, gradient = step(jax.random.key(0))
    assert np.isfinite(loss)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(gradient)))
