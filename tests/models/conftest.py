"""Networks take no keys but at their start, and checks of keys slow what is traced and called."""

import jax
import pytest


@pytest.fixture(autouse=True)
def keys_unchecked():
    with jax.debug_key_reuse(False):
        yield
