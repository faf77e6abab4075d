"""One tiny joint config; nothing here is about its figures, all about what they are made of."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def quickstart():
    """The quickstart's smoke run on 8 x 8 pixels with one block, as plain values."""
    path = ROOT / "configs/quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke").to_dict()
    config["data"]["train"]["size"] = config["data"]["val"]["size"] = 16
    config["system"]["size"] = (16, 16)
    config["system"]["denoiser"] |= {"depth": 1, "width": 16}
    config["system"]["text"] |= {"width": 16, "length": 4}
    schedule = {"name": "constant", "lr": 1e-3}
    return config | {"optimizer": {"name": "adamw", "schedule": schedule}}
