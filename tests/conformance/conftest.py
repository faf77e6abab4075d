"""Every conformance test runs over the fixture folders whose names match its pattern.

A test marks itself with ``@pytest.mark.cases("uvit_*")`` and takes ``case``; a pattern that begins
with "!" leaves out what matches the rest of it.
"""

import dataclasses
import fnmatch
import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest


@functools.cache
def archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a fixture, read once for all its checks: opening each costs a millisecond."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file.items())
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """One fixture folder: its inputs, expected outputs, weights and meta data."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def config(self) -> dict:
        return self.meta["config"]

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        found = archive(self.folder / "io.npz")
        return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        return self.arrays("in_")

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        return self.arrays("out_")

    @property
    def weights(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        return load_file(self.folder / "weights.safetensors")

    def check(self, name: str, got, *, want=None) -> None:
        """Asserts ``|got - want| <= atol + rtol |want|`` at the fixture's own tolerance."""
        want = self.outputs[name] if want is None else want
        tolerance = self.meta["tolerance"]
        np.testing.assert_allclose(
            np.asarray(got),
            want,
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
            err_msg=f"{self.name}: {name}",
        )
        print(f"checked {self.name}: {name}")


def fixtures_folder(config) -> Path:
    given = config.getoption("--fixtures")
    if given:
        return Path(given)
    beside = Path(config.rootpath) / ".." / "shared" / "fixtures"
    return beside if beside.is_dir() else Path(os.environ.get("JOINTSEG_FIXTURES", beside))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "cases(pattern, ...): the fixture folders this test runs over"
    )


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    folder = fixtures_folder(metafunc.config)
    if not folder.is_dir():
        reason = f"no fixtures folder at {folder.name!r}: give --fixtures DIR or JOINTSEG_FIXTURES"
        skip = pytest.param(None, id="no-fixtures", marks=pytest.mark.skip(reason=reason))
        metafunc.parametrize("case", [skip])
        return
    folders = sorted(d for d in folder.iterdir() if selects(marker.args, d.name))
    if not folders:
        raise pytest.UsageError(f"no fixture in {folder} matches {marker.args}")
    metafunc.parametrize("case", [pytest.param(Case(d), id=d.name) for d in folders])


def selects(patterns, name):
    """True if one of the patterns matches, and none of those with "!"."""
    wanted = [p for p in patterns if not p.startswith("!")]
    unwanted = [p.removeprefix("!") for p in patterns if p.startswith("!")]
    return any(fnmatch.fnmatch(name, p) for p in wanted) and not any(
        fnmatch.fnmatch(name, p) for p in unwanted
    )


def pytest_terminal_summary(terminalreporter):
    """Says what was compared: fixture folders, arrays at their tolerance, and cases inside them."""
    passed = [r for r in terminalreporter.stats.get("passed", []) if "conformance/" in r.nodeid]
    lines = [line for r in passed if r.when == "call" for line in r.capstdout.splitlines() if line]
    arrays = {line for line in lines if line.startswith("checked ")}
    folders = {
        r.nodeid.split("[")[1].split("]")[0].split("-")[0] for r in passed if "[" in r.nodeid
    }
    if passed:
        terminalreporter.section("conformance")
        for line in sorted({line for line in lines if line not in arrays}):
            terminalreporter.line(line)
        terminalreporter.line(
            f"{len(folders)} fixture folders, {len(passed)} tests, {len(arrays)} arrays compared"
        )
