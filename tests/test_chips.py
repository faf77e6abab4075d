"""Compiler options: only what this jaxlib knows, and for convolutions alone."""

from jointseg_jax import chips
from jointseg_jax.sharding import make_mesh


def test_an_option_that_this_jaxlib_lacks_is_noticed():
    assert not chips._known((("xla_no_such_option", "1"),))


def test_convolutions_alone_have_options_on_a_cpu():
    mesh = make_mesh((-1, 1, 1))
    assert chips.compiler_options(mesh) is None
    known = chips._known(tuple(chips.CPU_CONVOLUTIONS.items()))
    wanted = chips.CPU_CONVOLUTIONS if known else None
    assert chips.compiler_options(mesh, convolutions=True) == wanted
