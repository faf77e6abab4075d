"""Who may import whom: read off the source, without running it.

types rules rng sharding config <- transport <- models <- codecs <- systems <- training generation
evaluation <- launch. Beside that line stand ``data`` (numpy only, it runs in loader workers),
``weights`` and what composes or draws.
"""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "jointseg_jax"

FOUNDATION = {
    "types",
    "rules",
    "rng",
    "sharding",
    "config",
    "specs",
    "chips",
    "settings_diff",
    "jsonl",
}
LOOPS = {"training", "generation", "evaluation"}
PROCESSES = {"distributed"}

ALLOWED = {
    **dict.fromkeys(FOUNDATION, FOUNDATION),
    "transport": FOUNDATION,
    "models": {"transport"} | FOUNDATION,
    "codecs": {"models", "transport"} | FOUNDATION,
    "systems": {"codecs", "models", "transport"} | FOUNDATION,
    "data": {"config", "types", "settings_diff"},
    "annotations": {"data", "types"},
    "presets": set(),
    "weights": {"codecs", "models"} | FOUNDATION,
    "profiling": {"models"} | FOUNDATION,
    "build": {"systems", "codecs", "models", "transport", "data"} | FOUNDATION,
    **dict.fromkeys(
        LOOPS,
        {"systems", "codecs", "models", "transport", "data", "build", "profiling", "weights"}
        | (LOOPS | FOUNDATION | {"annotations", "distributed"}),
    ),
    "distributed": {"types"},
    "perf": {"systems", "models", "data", "build", "profiling", "annotations"} | LOOPS | FOUNDATION,
    "check": {"data", "build", "weights", "training"} | FOUNDATION,
    "config_help": {"systems", "transport", "build", "training"} | FOUNDATION,
    "validate": {"perf", "data", "build", "check"} | LOOPS | FOUNDATION,
    "cli": {"data"} | PROCESSES | FOUNDATION,
    "configs": {"presets"},
}
"""Part of the package (or top folder) -> the parts it may import; ``launch`` may import all."""

ONLY_IN = {
    "flax": {"models", "codecs", "training"},
    "optax": {"training"},
    "orbax": {"training"},
    "ml_collections": {"configs", "launch"},
    "grain": {"data"},
}
NEVER = {"tensorflow", "torch", "torchvision", "tf_keras", "keras"}
NOT_IN_DATA = {"jax", "jaxlib", "flax", "optax", "orbax"}


def files():
    return [
        path
        for folder in (PACKAGE, "launch", "configs")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def part_of(path):
    """``transport`` for jointseg_jax/transport/times.py, ``types`` for jointseg_jax/types.py."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return rest[0] if folder == PACKAGE else folder


@functools.cache
def imports(path):
    """Every module a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def parts_imported(path):
    names = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in names if parts[0] == PACKAGE and len(parts) > 1}


def packages_imported(path):
    return {name.split(".")[0] for name in imports(path)}


def test_every_part_has_its_place():
    parts = {part_of(path) for path in files()}
    assert parts - {"__init__", "launch"} == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_what_lies_below_it_only(part):
    wrong = {
        f"{path.relative_to(ROOT)} imports {other}"
        for path in files()
        if part_of(path) == part
        for other in parts_imported(path) - ALLOWED[part] - {part}
    }
    assert not wrong


def test_libraries_stay_where_they_belong():
    wrong = {
        f"{path.relative_to(ROOT)} imports {library}"
        for path in files()
        for library in packages_imported(path) & set(ONLY_IN)
        if part_of(path) not in ONLY_IN[library]
    }
    assert not wrong


def test_no_other_framework_is_imported_anywhere():
    for path in files():
        assert not packages_imported(path) & NEVER, path


def test_the_data_part_runs_without_jax():
    for path in files():
        if part_of(path) == "data":
            assert not packages_imported(path) & NOT_IN_DATA, path


def test_configs_import_no_other_config():
    names = {path.stem for path in files() if part_of(path) == "configs"}
    for path in files():
        if part_of(path) == "configs":
            assert not packages_imported(path) & (names | {"configs"}), path
