"""From specs to objects: every mistake names the place and what would have been accepted."""

import dataclasses

import flax.linen as nn
import pytest

from jointseg_jax.specs import make
from jointseg_jax.types import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Circle:
    radius: float
    colour: str = "red"

    def __post_init__(self):
        if self.radius <= 0:
            raise ValueError(f"radius={self.radius}: must be positive.")


class Layer(nn.Module):
    width: int = 1

    def __call__(self, x):
        return x


def square(*, side, filled=False):
    return side, filled


TABLE = {"circle": Circle, "square": square, "layer": Layer}


def test_name_and_fields_make_the_object():
    assert make(TABLE, {"name": "circle", "radius": 2.0}, where="shape") == Circle(radius=2.0)
    assert make(TABLE, {"name": "square", "side": 3}, where="shape", filled=True) == (3, True)
    assert make(TABLE, {"name": "layer", "width": 4}, where="shape").width == 4


def test_a_spec_is_left_as_it_is():
    spec = {"name": "circle", "radius": 2.0}
    assert make(TABLE, spec, where="shape") == make(TABLE, spec, where="shape")
    assert spec == {"name": "circle", "radius": 2.0}


@pytest.mark.parametrize(
    ("spec", "extra", "message"),
    [
        ({}, {}, "config.system.shape: needs a `name`, one of: circle, layer, square."),
        (
            {"name": "cirle"},
            {},
            "config.system.shape.name: 'cirle' is unknown (did you mean 'circle'?); "
            "one of: circle, layer, square.",
        ),
        ({"name": "hexadecagon"}, {}, "'hexadecagon' is unknown; one of: circle, layer, square."),
        (
            {"name": "circle", "radios": 1.0},
            {},
            "config.system.shape: circle has no field 'radios' (did you mean 'radius'?); "
            "its fields: radius, colour.",
        ),
        ({"name": "layer", "parent": None}, {}, "layer has no field 'parent'"),
        ({"name": "square", "filled": True}, {"filled": False}, "square has no field 'filled'"),
        ({"name": "circle", "radius": -1.0}, {}, "config.system.shape: circle: radius=-1.0: must"),
        ({"name": "circle"}, {}, "config.system.shape: circle: "),
    ],
)
def test_mistakes_are_named(spec, extra, message):
    with pytest.raises(UserError) as error:
        make(TABLE, spec, where="system.shape", **extra)
    assert message in str(error.value)


def test_a_missing_field_is_named():
    with pytest.raises(UserError, match="missing 1 required keyword-only argument: 'radius'"):
        make(TABLE, {"name": "circle"}, where="shape")
