"""Codecs of convolutions, which some tests train: there running takes longer than compiling."""

import jax
import pytest


@pytest.fixture(scope="module")
def optimized():
    """Programs compiled as users' are, for the tests of a module."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
