"""Rows in parts give what all rows give, and sharded rows stay on their devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jointseg_jax.codecs import batched_map


def test_part_count_is_the_smallest_divisor_that_fits(monkeypatch):
    monkeypatch.setattr(batched_map, "LIVE_VALUES", 100)
    assert batched_map.part_count(16, 10, 1) == 2  # 10 rows would fit, 16 have no divisor between
    assert batched_map.part_count(16, 10, 8) == 1
    assert batched_map.part_count(7, 60, 1) == 7
    assert batched_map.part_count(5, 1000, 8) == 5
    # the same share per device: the same parts
    assert batched_map.part_count(4, 30, 1) == batched_map.part_count(32, 30, 8)


def test_rows_keep_their_order(monkeypatch):
    monkeypatch.setattr(batched_map, "LIVE_VALUES", 1)
    rows = jnp.arange(48.0).reshape(24, 2)
    got = batched_map.map_rows(lambda x: {"y": x.sum(1), "z": x}, rows, values_per_row=1)
    np.testing.assert_array_equal(got["y"], rows.sum(1))
    np.testing.assert_array_equal(got["z"], rows)


def test_sharded_rows_are_not_moved(monkeypatch):
    monkeypatch.setattr(batched_map, "LIVE_VALUES", 2 * 64)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    placed = NamedSharding(mesh, PartitionSpec("data"))
    rows = jax.device_put(jnp.ones((4 * len(jax.devices()), 64)), placed)
    mapped = jax.jit(
        lambda x: batched_map.map_rows(jnp.sin, x, values_per_row=64), out_shardings=placed
    )
    with jax.set_mesh(mesh):
        text = mapped.lower(rows).compile().as_text()
    assert "while" in text  # it is in parts
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
