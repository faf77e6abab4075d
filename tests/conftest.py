"""JAX made strict: 8 host devices, no rank promotion, no key reuse, shapes checked.

Programs here are compiled once and run for milliseconds, so they are compiled with little
optimization, and what one process of a session has compiled, every other reads from a folder.
"""

import atexit
import collections
import gc
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
given = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in given:
    given = f"{given} --xla_force_host_platform_device_count=8".strip()
os.environ["XLA_FLAGS"] = given
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # The older code generator takes half the time to compile, and one thread is enough.
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{given} {quick}"
    os.environ["QUICK_XLA_FLAGS"] = quick

from jaxtyping import install_import_hook

install_import_hook("jointseg_jax", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
jax.devices()  # reads the flags; libtpu does not know them, so processes started here get none
os.environ["XLA_FLAGS"] = given
# their programs are other ones
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] + "/quick")

NO_KEYS = ("conformance", "data", "models", "perf", "weights")
"""Folders whose tests do not check that no key is used twice: it slows all that is traced."""


@pytest.fixture(autouse=True, scope="module")  # before what a module trains for its tests
def keys_used_once(request):
    with jax.debug_key_reuse(request.path.parent.name not in NO_KEYS):
        yield


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


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items):
    """All options of a test but the N of ``thorough_but(N)``, spread over them, are thorough."""
    options = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("thorough_but"):
            options[item.path, item.originalname].append(item)
    for found in options.values():
        (few,) = found[0].get_closest_marker("thorough_but").args
        last, gaps = len(found) - 1, max(few - 1, 1)
        kept = {round(i * last / gaps) for i in range(few)}  # the first, the last, those between
        for place, item in enumerate(found):
            if place not in kept:
                item.add_marker("thorough")


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not go through it again."""
    gc.freeze()


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
