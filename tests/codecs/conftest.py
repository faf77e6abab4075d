"""Some tests train codecs of convolutions: there running takes longer than compiling."""

import jax
import pytest


@pytest.fixture
def optimized():
    """Programs compiled as users' are."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
