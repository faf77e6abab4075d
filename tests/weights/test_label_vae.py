"""Reference weights go in and come out unchanged; anything unaccounted for is named."""

import functools

import jax
import numpy as np
import pytest

from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.types import UserError
from jointseg_jax.weights.label_vae import from_reference, table, to_reference


@functools.lru_cache
def fresh():
    draws = np.random.default_rng(0)
    shapes = jax.eval_shape(CODEC.init, jax.random.key(0))
    return jax.tree.map(lambda s: draws.normal(size=s.shape).astype(np.float32), shapes)


CODEC = LabelAE(
    classes=5, widths=(8, 16), up_widths=(16,), middle_width=16, groups=4, middle_blocks=2
)


def test_both_directions_are_exact_and_complete():
    params = fresh()
    reference = to_reference(CODEC, params)
    assert len(reference) == len(jax.tree.leaves(params)) == len(table(CODEC))
    back = from_reference(CODEC, reference)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)))


def test_published_keys():
    keys = {r.reference.rsplit(".", 1)[0] for r in table(LabelAE(classes=21))}
    encoder = {f"encoder.{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11, 13, 15)}
    assert keys == encoder | {f"decoder.{i}" for i in (0, 2, 3, 5, 6, 8, 9, 11, 13)}


def test_what_does_not_fit_is_named():
    good = to_reference(CODEC, fresh())
    some = {k: v for k, v in good.items() if k != "encoder.0.bias"} | {"extra": np.zeros(1)}
    with pytest.raises(UserError, match=r"1 missing \(encoder\.0\.bias\), 1 not .* \(extra\)"):
        from_reference(CODEC, some)
    wrong = good | {"decoder.0.weight": np.zeros((16, 5, 3, 3), np.float32)}
    with pytest.raises(UserError, match=r"decoder/conv_in/kernel is \(3, 3, 5, 16\)"):
        from_reference(CODEC, wrong)
    with pytest.raises(UserError, match="patch = 2"):
        table(LabelAE(classes=21, patch=2))
    with pytest.raises(UserError, match="missing"):
        to_reference(CODEC, {"encoder": fresh()["encoder"]})
