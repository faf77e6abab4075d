"""Checkpoints that are whole or not used: atomic, asynchronous, verified bit by bit.

A step folder ``N`` holds the arrays (``state``, Orbax) and one sealed JSON object (``meta``): what
the caller gave, the step, and for each array its dtype, shape and 64-bit digest (``snapshot``).

Folders are read newest first: seal, structure, then the digest of every array as it lies on the
devices. A folder that fails is named in one warning line and renamed ``N.damaged-<cause>``; the one
before it is tried. An array of another shape, dtype or name than the model wants is refused, never
cast: that is not damage but another configuration.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from jointseg_jax import distributed
from jointseg_jax.rules import path_of
from jointseg_jax.training import digest, snapshot
from jointseg_jax.training.snapshot import Damage, Meta
from jointseg_jax.types import UserError

_MARKER = "commit_success.txt"  # written last: a folder without it does not count
log = logging.getLogger(__name__)


class SaveError(UserError):
    """A checkpoint that could not be written; the earlier ones are untouched."""


class Checkpoints:
    """The step folders under one folder.

    Args:
      folder: created if absent (unless ``read_only``), on a file system that all processes see.
      keep: how many of the newest steps stay.
      keep_every: steps divisible by this stay for good.
      async_: write in the background; errors surface in ``check``, ``wait`` or the next ``save``.
      read_only: for samplers and evaluators beside a running trainer; nothing is touched.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        async_: bool = True,
        read_only: bool = False,
    ):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"checkpoints: keep={keep}, keep_every={keep_every}: must be >= 1.")
        remote = "://" in os.fspath(folder)  # not made a local path; runs refuse such a workdir
        self.folder = epath.Path(folder if remote else os.path.abspath(folder))
        self._read_only = read_only
        self._manager: ocp.CheckpointManager | None = None
        self._pending: tuple[int | None, int] = (None, 0)  # step and bytes of the save in flight
        if not read_only:
            _require_writable(self.folder)
            self._sweep(writing=True)
            self._manager = _manager(self.folder, keep, keep_every, async_)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The committed steps on disk, ascending; the same on every process."""
        found = [n for n in _numbered(self.folder) if (self.folder / str(n) / _MARKER).exists()]
        # One process's listing for all: a folder may appear or go between two listings, and the
        # processes would then wait for one another at different steps.
        return json.loads(distributed.share(json.dumps(found)))

    def newest(self) -> int | None:
        """The newest committed step; not yet verified."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, meta: Mapping[str, object]) -> bool:
        """Writes ``state`` and ``meta``; False if this step is already there.

        Returns once the state has been copied off the devices: it may be donated at once.

        Raises:
          SaveError: this save, or the one before in the background, failed: not enough space, no
            permission, or the folder is gone.
        """
        if self._manager is None:
            raise ValueError(f"checkpoints {self.folder}: opened with read_only=True; cannot save.")
        self.wait()  # a failure of the last save is reported as that save's, not as this one's
        if step in self._manager.all_steps():
            return False
        leaves = snapshot.leaves(state)
        # the digests are computed before anything is written, from the arrays on the devices
        content = snapshot.sealed(step, meta, leaves, digest.leaf_digests(state))
        arrays = snapshot.encode(leaves)
        saved, described = ocp.args.PyTreeSave(arrays), ocp.args.JsonSave(content)
        items = ocp.args.Composite(state=saved, meta=described)
        self._pending = (step, sum(x.nbytes for x in jax.tree.leaves(arrays)))
        with self._explained():
            if not self.folder.is_dir():  # Orbax would leave threads waiting for it
                raise FileNotFoundError(f"{self.folder} is gone")
            return self._manager.save(step, args=items, force=True)

    def check(self) -> None:
        """Raises what went wrong in the background, if anything; cheap, for every step."""
        if self._manager is not None:
            with self._explained():
                self._manager.check_for_errors()
            # Orbax keeps a failure to itself until the next save: ask as soon as the write is over
            if self._pending[0] is not None and not self._manager.is_saving_in_progress():
                self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        if self._manager is not None:
            with self._explained():
                self._manager.wait_until_finished()
            self._pending = (None, 0)

    def close(self) -> None:
        """Waits for the last write and lets go of the folder."""
        self.wait()
        if self._manager is not None:
            self._manager.close()

    def restore_newest(
        self,
        abstract_state: PyTree,
        *,
        only: Sequence[str] = (),
        accept: Callable[[Meta], None] | None = None,
        start_afresh: bool = False,
    ) -> tuple[PyTree, Meta] | None:
        """The newest state that verifies, with its meta; None if the folder holds no checkpoint.

        Args:
          abstract_state: ``ShapeDtypeStruct`` leaves; their shardings say where arrays go.
          only: path prefixes (``("ema",)``); other leaves are neither read nor allocated and come
            back as they were given. The tree may also hold those sub-trees alone.
          accept: called with the meta before any array is read; raises to refuse
            (``settings_diff.require_same``).
          start_afresh: also return None when every checkpoint is damaged.

        Raises:
          UserError: the arrays are not those of this model, or all checkpoints are damaged.
        """
        self.wait()
        self._sweep()
        for step in reversed(self.steps()):
            try:
                meta = snapshot.read_sealed(self.folder / str(step))
                if accept is not None:
                    accept(meta)
                with snapshot.quiet():
                    return self._restore(step, abstract_state, meta, only), meta
            except Damage as damage:
                self._set_aside(step, damage)
        damaged = sorted(name for name in _names(self.folder) if ".damaged-" in name)
        if damaged and not start_afresh:
            raise UserError(
                f"checkpoints {self.folder}: none can be used; damaged: {', '.join(damaged)}. "
                "The run does not start afresh by itself: put back a good copy, or train with "
                "--start_afresh, or choose another --workdir."
            )
        return None

    def _restore(self, step: int, abstract: PyTree, meta: Meta, only: Sequence[str]) -> PyTree:
        rows, leaves = meta["checkpoint"]["leaves"], snapshot.leaves(abstract)
        saved = {p: rows[p] for p in snapshot.within(rows, only)}
        wanted = {p: leaves[p] for p in snapshot.within(leaves, only)}
        folder = self.folder / str(step)
        kinds = {p: kind for p, (kind, _) in saved.items()}
        snapshot.require_fit(kinds, {p: digest.describe(x) for p, x in wanted.items()}, str(folder))
        state = snapshot.read(folder / "state", wanted)
        # Orbax stores arrays without a checksum: without this a flipped bit is restored silently
        changed = sorted(p for p, d in digest.leaf_digests(state).items() if d != saved[p][1])
        if changed:
            more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
            raise Damage("digest", f"{changed[0]}{more}: other bits than were saved")
        return jax.tree_util.tree_map_with_path(lambda p, x: state.get(path_of(p), x), abstract)

    def _sweep(self, writing: bool = False) -> None:
        """Sets aside what looks like a step without a marker; removes interrupted writes."""
        if jax.process_index() == 0:  # one process renames; the others wait below
            for step in _numbered(self.folder):
                folder = self.folder / str(step)
                if (folder / _MARKER).exists():
                    continue
                if not _names(folder):
                    self._rename(step, Damage("empty", "the folder is empty"))
                elif _was_committed(folder):
                    self._rename(step, Damage("uncommitted", f"{_MARKER} is missing"))
                elif writing:  # a reader beside a trainer must leave its unfinished write alone
                    log.warning("checkpoint %s: its write was interrupted; removed.", folder)
                    folder.rmtree()
        ocp.multihost.sync_global_processes("checkpoints.sweep")

    def _set_aside(self, step: int, damage: Damage) -> None:
        if jax.process_index() == 0:
            self._rename(step, damage, "; trying the one before")
        ocp.multihost.sync_global_processes("checkpoints.set_aside")
        if self._manager is not None:
            self._manager.reload()  # it keeps its own list of steps

    def _rename(self, step: int, damage: Damage, then: str = "") -> None:
        folder, taken, n = self.folder / str(step), _names(self.folder), 1
        name = stem = f"{step}.damaged-{damage.cause}"
        while name in taken:  # the same step may be damaged more than once
            name, n = f"{stem}.{n + 1}", n + 1
        done = "left as it is" if self._read_only else f"renamed {name}"
        log.warning("checkpoint %s is damaged (%s): %s%s.", folder, damage, done, then)
        if not self._read_only:
            folder.rename(self.folder / name)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of the file system into a message a user can act on."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            step, size = self._pending
            reason = _reason(error, self.folder, size)
            if reason is None:  # not the disk's fault: a bug keeps its traceback
                raise
            self._drop_partial()
            earlier = ", ".join(str(n) for n in _numbered(self.folder)) or "none"
            raise SaveError(
                f"checkpoint {step} in {self.folder} was not written: {reason} Earlier checkpoints "
                f"({earlier}) are untouched; the same command resumes from the newest."
            ) from error

    def _drop_partial(self) -> None:
        """Forgets the failed save and removes what it left, which would keep the disk full."""
        (step, _), self._pending = self._pending, (None, 0)
        if self._manager is None:
            return
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()  # raises the same failure once more
        folder = self.folder / str(step)
        if jax.process_index() == 0 and folder.exists() and not (folder / _MARKER).exists():
            with contextlib.suppress(OSError):
                folder.rmtree()
        with contextlib.suppress(OSError):
            self._manager.reload()


def read_meta(folder: str | os.PathLike, step: int | None = None) -> Meta:
    """The meta of ``step``, or of the newest step whose meta is whole; reads no arrays."""
    reader = Checkpoints(folder, read_only=True)
    problems = []
    for number in reversed(reader.steps() if step is None else [step]):
        try:
            return snapshot.read_sealed(reader.folder / str(number))
        except Damage as damage:
            problems.append(f"{number}: {damage}")
    found = "; ".join(problems) or "it holds no checkpoint"
    raise UserError(
        f"checkpoints {reader.folder}: {found}. Is this the folder of a run that saved?"
    )


def _manager(
    folder: epath.Path, keep: int, keep_every: int | None, async_: bool
) -> ocp.CheckpointManager:
    logging.getLogger("absl").addFilter(_without_orbax)
    policies = ocp.checkpoint_managers
    for_good = [] if keep_every is None else [policies.EveryNSteps(keep_every)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *for_good]),
        # a marker file, not a rename of the folder: object stores and some network disks cannot
        # rename a folder in one step
        atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE),
        cleanup_tmp_directories=False,  # would delete every folder without a marker; see _sweep
        enable_async_checkpointing=async_,
    )
    return ocp.CheckpointManager(folder, options=options)


def _without_orbax(record: logging.LogRecord) -> bool:
    """Drops Orbax's own log: dozens of lines per save, and tracebacks of errors reported here."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _names(folder: epath.Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _numbered(folder: epath.Path) -> list[int]:
    return sorted(int(name) for name in _names(folder) if name.isascii() and name.isdigit())


def _was_committed(folder: epath.Path) -> bool:
    """Returns True if Orbax had finished this folder, which has lost its marker since."""
    try:
        own = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
        return bool(own.get("commit_timestamp_nsecs"))
    except (OSError, ValueError, AttributeError):
        return False


def _require_writable(folder: epath.Path) -> None:
    # now rather than at the first save, hours later
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"checkpoints {folder}: cannot be written ({error.strerror or error}). "
            "Choose another --workdir, or fix its permissions."
        ) from error


def _reason(error: BaseException, folder: epath.Path, size: int) -> str | None:
    """What the file system refused, as a sentence; None if the fault lies elsewhere."""
    # Orbax and TensorStore wrap the system's error, often as text only: look through all causes
    text, cause = "", error
    while cause is not None:
        text, cause = f"{text} {cause}".lower(), cause.__cause__ or cause.__context__
    needed = f"{size / 1e6:.1f} MB needed"
    if "no space left" in text or "disk quota" in text:
        free = shutil.disk_usage(folder).free if folder.is_dir() else None
        known = "" if free is None else f", {free / 1e6:.1f} MB free"
        return f"no space left on the disk ({needed}{known}). Free some or lower `keep`."
    if "file too large" in text:
        return f"the file system or a limit refuses files of this size ({needed})."
    if "read-only file system" in text or "permission denied" in text:
        return "the folder may not be written (read-only file system or permissions)."
    if not folder.is_dir():
        return "the folder is gone."
    return "the disk reports an error (EIO)." if "input/output error" in text else None
