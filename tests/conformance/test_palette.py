"""Label colours against the reference numbers, for any list of data sets."""

import functools

import jax
import numpy as np
import pytest

from jointseg_jax.codecs.palette import Palette
from jointseg_jax.codecs.pixels import quantise
from jointseg_jax.types import FILE_VOID, VOID


def channels_last(x):
    return np.moveaxis(x, 0, -1)[None]


@functools.partial(jax.jit, static_argnums=0)
def written(codec, labels, uniforms):
    colours = codec.encode({}, labels)
    return colours, codec.perturb(colours, uniforms)


@functools.partial(jax.jit, static_argnums=0)
def read(codec, x):
    return codec.decode({}, x), codec.margin(x)


def exactly(case, name, got, want, margin=None):
    """Equal integers, but where two colours are as near as the tolerance on their distances."""
    tolerance = case.meta["tolerance"]["atol"]
    clear = np.ones(want.shape, bool) if margin is None else margin > tolerance
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(np.asarray(got)[clear], want[clear], err_msg=name)
    print(f"checked {case.name}: {name}")


def own_arrays(case, name, arrays):
    """The arrays of one data set, whose name may begin as another's does."""

    def owner(key):
        names = (n for n in case.config["datasets"] if key.startswith(f"{n}_"))
        return max(names, key=len, default=None)

    return {k.removeprefix(f"{name}_"): v for k, v in arrays.items() if owner(k) == name}


@pytest.mark.cases("semflow_codec*")
def test_colours_perturbation_and_reading(case):
    inputs, outputs = case.inputs, case.outputs
    seen = set()
    for name, config in case.config["datasets"].items():
        given, want = own_arrays(case, name, inputs), own_arrays(case, name, outputs)
        seen |= {f"{name}_{k}" for k in want}
        codec = Palette(
            classes=config["classes"],
            k=config["k"],
            s=config["s"],
            perturbation=float(config["co"] / 2 * 127.5),
        )
        labels = np.where(given["labels"] == FILE_VOID, VOID, given["labels"].astype(np.int32))
        exactly(case, f"{name}_palette", codec.colours(), want.pop("palette"))

        colours, moved = written(codec, labels[None], channels_last(given["u"]))
        exactly(case, f"{name}_pseudo_mask", quantise(colours)[0], want.pop("pseudo_mask"))
        normalised = channels_last(want.pop("normalised"))
        case.check(f"{name}_normalised", colours, want=normalised)

        perturbed = channels_last(want.pop("perturbed"))
        case.check(f"{name}_perturbed", moved, want=perturbed)
        noisy = normalised + channels_last(given["noise"])
        back = {}
        for kind, x in (("perturbed", perturbed), ("noisy", noisy)):
            back[kind], margin = (np.asarray(v)[0] for v in read(codec, x))
            reference = want.pop(f"margin_{kind}")
            case.check(f"{name}_margin_{kind}", margin, want=reference)
            key = f"decoded_{kind}"
            exactly(case, f"{name}_{key}", back[kind], want.pop(key), reference)

        limits = [codec.perturbation / 127.5, codec.perturbation, codec.reach, codec.reach / 127.5]
        key = "max_abs_perturbation"
        case.check(f"{name}_{key}", limits, want=want.pop(key))
        annotated = labels != VOID
        np.testing.assert_array_equal(back["perturbed"][annotated], labels[annotated])
        assert not want, f"{case.name}: nothing compares {sorted(want)}"
    assert seen == set(outputs)
