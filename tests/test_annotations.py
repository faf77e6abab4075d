"""Shapes in annotations are text that jaxtyping reads, and so are checked: read off the source."""

import ast
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

from jointseg_jax.models.embed import IndexToken, sinusoid

PACKAGE = Path(__file__).parents[1] / "jointseg_jax"

DTYPES = {name for name in dir(jaxtyping) if isinstance(getattr(jaxtyping, name), type)} | {"Key"}
NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}


def shapes(source):
    """(dtype, its second subscript) of every annotation such as ``Float[Array, "batch width"]``."""
    tree = ast.parse(source)
    nodes = [ast.parse(n.value) for n in ast.walk(tree) if _quoted_annotation(n)]
    for node in (n for t in [tree, *nodes] for n in ast.walk(t)):
        if not isinstance(node, ast.Subscript):
            continue
        name = getattr(node.value, "id", getattr(node.value, "attr", None))
        if name in DTYPES and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
            yield name, node.slice.elts[1]


def _quoted_annotation(node):
    """``x: "Float[Array, ...]"``, as nested functions of kernels may write it."""
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and text.split("[")[0] in DTYPES and text.endswith("]")


def mistakes(source):
    """What is wrong with the annotations of a module."""
    for name, axes in shapes(source):
        if not (isinstance(axes, ast.Constant) and isinstance(axes.value, str)):
            yield f"line {axes.lineno}: {name}[..., {ast.unparse(axes)}] is not checked"
        elif words := NUMBERS & set(axes.value.split()):
            yield f"line {axes.lineno}: {name} has an axis called {words}, which has any size"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_every_shape_is_text(path):
    assert not list(mistakes(path.read_text()))


@pytest.mark.parametrize("axes", ["batch", '"batch one width"', "(batch, width)"])
def test_what_is_not_checked_is_found(axes):
    assert len(list(mistakes(f"def f(x: Float[Array, {axes}]): ..."))) == 1
    assert not list(mistakes('def f(x: Float[Array, " batch"]) -> dict[str, int]: ...'))


def test_a_wrong_shape_of_one_axis_raises():
    """With an axis that is a bare name these passed: nothing was checked."""
    with pytest.raises(jaxtyping.TypeCheckError):
        sinusoid(jnp.zeros((2, 3)), 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        sinusoid(jnp.zeros(2, jnp.int32), 8)
    token = IndexToken(3, 8, jnp.float32)
    variables = {"params": {"embedding": jnp.zeros((3, 8)), "position": jnp.zeros((1, 8))}}
    assert token.apply(variables, jnp.zeros(2, jnp.int32)).shape == (2, 1, 8)
    with pytest.raises(jaxtyping.TypeCheckError):
        token.apply(variables, jnp.zeros((2, 1), jnp.int32))
