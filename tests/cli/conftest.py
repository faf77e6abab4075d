"""Launchers as a user runs them: other processes, with one shared compile cache.

Programs are compiled with little optimization, for they run for a second at most. A launch that
gets no signal shares a process with those before it (``served.py``).
"""

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LONGEST = 600
"""Seconds after which a launch counts as hung."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Runs ``launch/NAME.py`` in the repository root."""

    environment: dict[str, str]
    folder: Path
    """Where a served launch leaves what it prints."""

    servers: dict[str, subprocess.Popen] = dataclasses.field(default_factory=dict)
    """By what they were started with."""

    def start(self, name: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
        """Starts a launcher in a process of its own and returns the process."""
        command = [sys.executable, f"launch/{name}.py", *map(str, arguments)]
        settings = self._settings(name, devices) | {"stdout": subprocess.PIPE}
        return subprocess.Popen(command, **settings, stderr=subprocess.PIPE)

    def __call__(
        self, name: str, *arguments: object, devices: int = 1, status: int = 0
    ) -> "Finished":
        """Runs a launcher to its end and checks its exit status."""
        out, error = self.folder / "out.txt", self.folder / "error.txt"
        for file in (out, error):
            file.write_text("")  # nothing of the launch before
        server = self._server(self._settings(name, devices))
        request = [name, [str(word) for word in arguments], str(out), str(error)]
        hung = threading.Timer(LONGEST, server.kill)
        hung.start()
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        hung.cancel()
        found = int(answer) if answer else server.wait()  # it ended there and then
        done = Finished(out.read_text(), error.read_text())
        assert found == status, f"status {found}\n{done.out}\n{done.error}"
        return done

    def close(self) -> None:
        """Ends the processes that launches share."""
        for server in self.servers.values():
            server.communicate()

    def _settings(self, name: str, devices: int) -> dict:
        flags = f"--xla_force_host_platform_device_count={devices}"
        if name != "compile":  # libtpu, which it needs, does not know them
            flags += " " + os.environ.get("QUICK_XLA_FLAGS", "")
        return {"cwd": ROOT, "text": True, "env": {**self.environment, "XLA_FLAGS": flags}}

    def _server(self, settings: dict) -> subprocess.Popen:
        key = json.dumps(settings["env"], sort_keys=True)
        if key not in self.servers or self.servers[key].poll() is not None:
            pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            command = [sys.executable, Path(__file__).with_name("served.py")]
            self.servers[key] = subprocess.Popen(command, **settings, **pipes)
        return self.servers[key]

    def on_disk(self, size: str, folder: Path, script: str) -> subprocess.CompletedProcess:
        """Runs a shell script that finds a file system of its own at ``$DISK``, or skips the test.

        What is written there is seen by the script only.

        Args:
          size: of the file system, as mount takes it.
          folder: where it is put.
        """
        mount = f'mount -t tmpfs -o size={size} tmpfs "$DISK"'
        given = {"XLA_FLAGS": "", "DISK": str(folder), "PYTHON": sys.executable}
        return subprocess.run(
            [*_private_mounts(), "sh", "-ec", f"{mount}; {script}"],
            cwd=ROOT,
            env=self.environment | given,
            capture_output=True,
            text=True,
            timeout=300,
        )


def _private_mounts() -> list[str]:
    unshare = shutil.which("unshare") or "false"
    for how in ("-m", "-rm"):
        probe = [unshare, how, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            return [unshare, how]
    pytest.skip("a small disk needs unshare and the permission to mount; neither is given here")


@dataclasses.dataclass(frozen=True)
class Finished:
    out: str
    error: str
    workdir: Path | None = None

    @property
    def json(self) -> dict:
        """The object on the last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])

    @property
    def digest(self) -> str:
        """The final digest a training run logs."""
        (line,) = [x for x in self.error.splitlines() if x.startswith("done: step")]
        return line.split("digest ")[1].split(",")[0]


def pytest_collection_modifyitems(items):
    """What is here is of the tier `cli`, but for what is slow and one launch of each launcher."""
    here = Path(__file__).parent
    for item in items:
        if item.path.parent != here or item.path.name == "test_each_launcher.py":
            continue
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.cli)


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # with the compile cache of all tests
    launcher = Launcher(os.environ | settings, tmp_path_factory.mktemp("launches"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def launched(launch, tmp_path_factory):
    """The quickstart's smoke run, trained once for all workers of pytest."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of the session, with one folder for each worker
    workdir, said = folder / "launched", folder / "launched.json"
    with open(folder / "launched.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first trains, the others wait for it
        if not said.exists():
            done = launch("train", "--config=configs/quickstart.py:smoke", f"--workdir={workdir}")
            said.write_text(json.dumps([done.out, done.error]))
    return Finished(*json.loads(said.read_text()), workdir)


@pytest.fixture(scope="session")
def trained(launched, tmp_path_factory):
    """A copy of its workdir, for one worker."""
    return shutil.copytree(launched.workdir, tmp_path_factory.mktemp("trained") / "run")
