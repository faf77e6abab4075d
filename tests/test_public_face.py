"""What ``from jointseg_jax import ...`` offers: every name is there, and none costs before use."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jointseg_jax

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json, sys
import jointseg_jax

alone = sorted({name.partition(".")[0] for name in sys.modules})
from jointseg_jax import Classes

print(json.dumps({"alone": alone, "after": sorted({n.partition(".")[0] for n in sys.modules})}))
"""


@pytest.mark.parametrize("name", jointseg_jax.__all__)
def test_a_name_is_imported_when_it_is_used(name):
    assert name in dir(jointseg_jax)
    found = getattr(jointseg_jax, name)
    assert found is getattr(jointseg_jax, name)
    if callable(found):
        assert found.__module__.startswith("jointseg_jax.") and found.__doc__


def test_no_other_name_is_there():
    with pytest.raises(AttributeError, match="no attribute 'Jiont'"):
        jointseg_jax.Jiont  # noqa: B018
    public = {name for name in dir(jointseg_jax) if not name.startswith("_")}
    modules = {path.stem for path in (ROOT / "jointseg_jax").iterdir()} | {"jaxtyping"}  # the hook
    assert public - modules == set(jointseg_jax.__all__)


def test_the_package_imports_next_to_nothing():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    heavy = {"jax", "flax", "numpy", "orbax", "grain", "PIL"}
    assert not heavy & set(found["alone"])
    assert "numpy" in found["after"] and "jax" not in found["after"]  # classes are host data


def test_the_package_is_typed_for_others():
    with (ROOT / "pyproject.toml").open("rb") as file:
        tools = tomllib.load(file)["tool"]["setuptools"]
    assert tools["package-data"]["jointseg_jax"] == ["py.typed"]
    assert (ROOT / "jointseg_jax/py.typed").is_file()
