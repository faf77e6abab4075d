"""The package imports without TensorFlow or torch, and never asks for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import importlib, importlib.abc, json, pkgutil, sys

FOREIGN = ("tensorflow", "torch", "keras", "tf_keras")
asked = []


class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FOREIGN:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
import jointseg_jax

alone = sorted(sys.modules)
names = [m.name for m in pkgutil.walk_packages(jointseg_jax.__path__, "jointseg_jax.")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"names": names, "asked": asked, "alone": alone}))
"""


@pytest.mark.thorough
def test_every_module_imports_without_tensorflow_and_torch():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "jointseg_jax").rglob("*.py")
    }
    assert {*found["names"], "jointseg_jax"} == files
    assert not found["asked"]  # not even by a library that would do without
    assert "jax" not in found["alone"]  # the name and version alone cost nothing
