"""What the TPU compiler makes of a small config, where libtpu is installed.

In a process of its own: once libtpu has described a topology, JAX's profiler ends the process that
starts a trace, and other tests trace.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jointseg_jax.config import plain

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the extra `tpu`)"
)
TOPOLOGIES = ("v5e:2x2", "v5p:4x4x4", "v6e:16x16")

PROGRAM = """
import json, sys
from jaxtyping import install_import_hook
install_import_hook("jointseg_jax", "beartype.beartype")
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
from jointseg_jax import build, chips
from jointseg_jax.config import RunConfig, from_plain
from jointseg_jax.perf import abstract, programs, report
from jointseg_jax.types import UserError

config = RunConfig.parse(from_plain(json.loads(sys.argv[1])))
out = {"devices": {name: len(chips.devices_of(name)) for name in sys.argv[2:]}}
try:
    chips.devices_of("v5e:3x7")
except UserError as error:
    out["refusal"] = str(error)
system = build.system(config.system, abstract.dataset_info(config))
shapes = jax.eval_shape(system.init, jax.random.key(0))
out["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
lowered = programs.lower_training(
    config, chips.devices_of("v5e:2x2"), missing=programs.Missing(), per_chip=2
)
made, text = report.compiled(lowered, chips.CHIPS["v5e"])
out |= {"values": made.values(), "moved": made.costs.collectives["all-reduce"].bytes}
out |= {"products": made.costs.flops * made.chips / lowered.flops, "entry": "ENTRY" in text}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def found(small):
    """One compilation for all tests; ten seconds of a CPU."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(plain(small.values)), *TOPOLOGIES]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_shape_that_the_compiler_refuses(found):
    assert "v5e:3x7: the TPU compiler refuses it" in found["refusal"]
    assert "Known to work" in found["refusal"]


def test_topologies_have_their_chips(found):
    sizes = {name: [int(n) for n in name.split(":")[1].split("x")] for name in TOPOLOGIES}
    assert found["devices"] == {name: math.prod(shape) for name, shape in sizes.items()}


def test_a_smoke_config_compiles_for_a_tpu(found, check_gradients, check_products):
    values = found["values"]
    assert values["fits"] and 0 < values["hbm_gb"] < 1
    check_gradients(4 * found["parameters"], found["moved"])
    check_products(found["products"])
    assert values["estimate_ms"] > values["roofline_ms"] > 0
    assert not values["unknown_loops"] and found["entry"]
    assert any(part.startswith("forward ") for part in values["estimate_parts_ms"])
    assert any(part.startswith("backward ") for part in values["estimate_parts_ms"])
    total = sum(values["estimate_parts_ms"].values())
    assert np.isclose(total, values["estimate_ms"], rtol=1e-3)  # five digits of each
