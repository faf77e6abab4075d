"""JAX made strict: 8 host devices, no rank promotion, no key reuse, shapes checked.

Programs here are compiled once and run for milliseconds, so they are compiled with little
optimization, and what one process of a session has compiled, every other reads from a folder.
"""

import atexit
import importlib.metadata
import logging
import os
import re
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # as in a worker of pytest-xdist: it has ours
    compiled = tempfile.mkdtemp(prefix="jointseg-tests-xla-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = ["--xla_force_host_platform_device_count=8"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # the older code generator takes half the time to compile; newer versions do not have it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [given, *(flag for flag in FLAGS if flag.partition("=")[0] not in given)]
).strip()

from jaxtyping import install_import_hook

install_import_hook("jointseg_jax", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_disable_most_optimizations", True)


def pytest_addoption(parser):
    # pytest itself has `--fixtures` (list its fixtures); here the word means reference data, and
    # pytest's listing stays available under its other name, `--funcargs`.
    builtin = parser.optparser._option_string_actions.pop("--fixtures")
    builtin.option_strings.remove("--fixtures")
    parser.addoption(
        "--fixtures",
        default=None,
        help="folder of conformance fixtures (default ../shared/fixtures, else $JOINTSEG_FIXTURES)",
    )


@pytest.fixture
def compilations():
    """A list that grows by the name of every program that JAX compiles, such as ``jit(update)``."""
    names, logger = [], logging.getLogger("jax")
    handler = logging.Handler()

    def emit(record):
        found = re.match(r"Finished XLA compilation of (\S+) in", record.getMessage())
        if found:
            names.append(found[1])

    handler.emit = emit
    logger.addHandler(handler)
    with jax.log_compiles():
        yield names
    logger.removeHandler(handler)
