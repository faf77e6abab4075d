"""One tiny joint config; nothing here is about its figures, all about what they are made of."""

import importlib.util
from pathlib import Path

import pytest

from jointseg_jax.config import RunConfig
from jointseg_jax.perf import abstract

ROOT = Path(__file__).parents[2]


def smoke():
    """The quickstart's smoke run."""
    path = ROOT / "configs/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("smoke").to_dict()


@pytest.fixture(scope="package")
def quickstart():
    """The quickstart's smoke run on 8 x 8 pixels with one block, as plain values."""
    config = smoke()
    config["data"]["train"]["size"] = config["data"]["val"]["size"] = 16
    config["system"]["size"] = (16, 16)
    config["system"]["denoiser"] |= {"depth": 1, "width": 16}
    config["system"]["text"] |= {"width": 16, "length": 4}
    schedule = {"name": "constant", "lr": 1e-3}
    return config | {"optimizer": {"name": "adamw", "schedule": schedule}}


@pytest.fixture(scope="package")
def small():
    """As little as can be compiled; AdamW, for Muon has products of its own."""
    schedule = {"name": "constant", "lr": 1e-3}
    given = smoke() | {"optimizer": {"name": "adamw", "clip": 1.0, "schedule": schedule}}
    # with shared tokens both streams' positions have one gradient, which the compiler finds out
    return abstract.with_denoiser(RunConfig.parse(given), depth=1, width=16, share=())


@pytest.fixture(scope="package")
def check_gradients():
    """Each crosses the wire once, and a few metrics; a bias that adds to a position shares its."""

    def check(gradients, moved):
        assert 0.97 * gradients <= moved <= 1.01 * gradients + 4096

    return check


@pytest.fixture(scope="package")
def check_products():
    """The network's own. Less: what does not change from step to step leaves the loop, and nobody
    needs the gradients of inputs, which count much in so narrow a network. More: codecs."""

    def check(ratio):
        assert 0.75 < ratio < 1.25, ratio

    return check
