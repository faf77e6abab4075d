"""The training loop: any system, one order, read from top to bottom.

data -> system -> update (shapes, rules, shardings) -> restore *or* initialise -> for each step
{next batch, update, log, preview, save} -> final save.

Everything random is a function of (seed, step, global row) and the data position is the step, so a
resumed run continues bit for bit. The host reads from the device at log points only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jointseg_jax import build, profiling, sharding
from jointseg_jax.annotations import viz
from jointseg_jax.config import RunConfig, plain
from jointseg_jax.data import files
from jointseg_jax.data.pipeline import Batch, Batches, CachedBatches, batches
from jointseg_jax.data.records import DatasetInfo, Source
from jointseg_jax.data.tokenizer import Words
from jointseg_jax.evaluation.scene_table import scene_line
from jointseg_jax.training import init_from, pretrained, resume
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.clock import Clock
from jointseg_jax.training.digest import state_digest
from jointseg_jax.training.faults import Faults
from jointseg_jax.training.lock import WorkdirLock
from jointseg_jax.training.opening import opening
from jointseg_jax.training.preemption import STOPPED, Preemption
from jointseg_jax.training.preview import Previewer
from jointseg_jax.training.state import TrainState
from jointseg_jax.training.step import TrainStep, check_batch, make_train_step
from jointseg_jax.training.workdir import load_codecs
from jointseg_jax.training.writers import Writers, run_writers
from jointseg_jax.types import UserError

log = logging.getLogger("jointseg_jax")


def train(
    config: RunConfig, workdir: Path, allow: Sequence[str] = (), *, start_afresh: bool = False
) -> int:
    """Trains to ``config.steps`` and returns the exit status.

    Args:
      workdir: where everything about the run is kept; the same workdir resumes.
      allow: regexes of config paths (``optimizer/schedule/lr``) that may differ from those the
        checkpoint was made with; the run then is no longer one that a straight run would equal.
      start_afresh: from step 0 if every checkpoint is damaged, which otherwise ends the run.
    """
    with Session(config, workdir) as session:
        clock, checkpoints = session.clock, session.checkpoints

        # ------------------------------------------------------------------ data, system
        mesh = sharding.make_mesh(config.mesh)
        check_batch(config, mesh)
        source = build.source(config, "train")
        info = session.dataset_info(source)
        tokenizer = build.tokenizer(config.system, info.vocabulary)
        host_batches = HostBatches(config, source, tokenizer)
        if config.system.trained_codecs():
            pretrained.from_cache(workdir, config.system, config.data.cache)
            with host_batches.start(0) as first:
                pretrained.import_codecs(workdir, config.system, info, first)
        specs, frozen = load_codecs(workdir, config.system)
        system = build.system(config.system, info, specs)

        # ---------------------------------------------------------- update, shapes first
        train_step = make_train_step(system, config, mesh)

        with jax.set_mesh(mesh):
            # ------------------------------------------------------ restore, or initialise
            settings = resume.settings(config, source)
            state = session.restore(train_step, settings, allow, start_afresh=start_afresh)
            if state is None:
                leaves = init_from.load(config.start, train_step.params, info)
                init = jax.jit(train_step.init, out_shardings=train_step.shardings)
                state = init(jax.random.key(config.seed), leaves)
            frozen = jax.device_put(frozen, sharding.replicated(mesh))

            # ------------------------------------------------------------------- loop
            # A checkpoint holds the state before the next batch is read: the data position is
            # the step, and the order of what follows is part of that contract.
            step, update, preview = int(state.step), None, None
            session.begin(step)
            if jax.process_index() == 0:
                log.info("%s", opening(config, workdir, step))
            reader = host_batches.start(step)
            try:
                while step < config.steps:
                    clock.reading(step)
                    rows = _next(reader, step)
                    batch = sharding.global_batch(rows, mesh)
                    if update is None:  # the first batch gives the shapes
                        update, flops = session.compile(train_step, system, state, frozen, batch)
                        preview = Previewer(config, system, info, mesh, tokenizer)
                        clock.compiled(flops)

                    clock.stepping()
                    with session.profiled(step):
                        state, metrics = update(state, frozen, batch)  # step.py -> system.loss
                    clock.stepped(step, metrics, rows["index"])
                    step += 1
                    last = step == config.steps

                    if _due(step, config.log.every, last):
                        back = session.log(step, state, reader, leave=0 if last else 1)
                        if back is not None:  # to the newest checkpoint, after a fault
                            state, step = back, int(back.step)
                            reader.close()
                            reader = host_batches.start(step)
                            session.begin(step)
                            continue
                    checkpoints.check()
                    if preview and config.preview.due(step, config.steps):
                        session.draw(preview, step, state, frozen)
                    if due := _due(step, config.checkpoint.every, last):
                        session.save(step, state, settings, wait=last)

                    # asked on every process and at every step: they agree on where to stop
                    if session.preemption.requested(step) and not last:
                        if not due:
                            session.save(step, state, settings, wait=True)
                        log.info("stopped on request at step %d; the same command goes on", step)
                        return STOPPED
            finally:
                reader.close()
            log.info("done: step %d, digest %s, in %s", step, state_digest(state), workdir)
            return 0


class Session:
    """What a launch holds open in its workdir: lock, signals, clock, checkpoints, writers."""

    def __init__(self, config: RunConfig, workdir: Path):
        self._config, self._workdir = config, workdir
        self._first = jax.process_index() == 0
        # the files of another process than the first have its number in their names
        self._own = "" if self._first else f".{jax.process_index()}"
        self._faults = Faults(config.nan)
        self._drawn = False  # whether this launch has shown samples
        self._writers = Writers([])  # until ``begin`` opens those of the run
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Session:
        config, workdir = self._config, self._workdir
        workdir.mkdir(parents=True, exist_ok=True)
        with self._open as opened:  # closes what is open if the next part cannot be
            opened.enter_context(WorkdirLock(workdir))
            self.preemption = opened.enter_context(Preemption())
            stacks = workdir / f"stacks{self._own}.txt"
            clock = Clock(
                workdir,
                steps=config.steps,
                batch=config.batch,
                watchdog=config.watchdog,
                stacks=stacks,
                writes=self._first,
            )
            self.clock = opened.enter_context(clock)
            self.checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
            opened.callback(self._close)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def _close(self) -> None:
        self.checkpoints.close()
        self._writers.close()

    # ------------------------------------------------------------------------ set-up

    def dataset_info(self, source: Source) -> DatasetInfo:
        """What the model must know of its data, the same as in the launches before."""
        info, path = DatasetInfo.of(source), self._workdir / "facts.json"
        if path.exists():
            resume.require_info(info, path)
        else:
            self._keep(path.name, info.dump())
        return info

    def _keep(self, name: str, text: str) -> None:
        """Writes a small file of the workdir, whole or not at all, on one process."""
        if self._first:
            files.write(self._workdir / name, text.encode())

    def restore(
        self,
        train_step: TrainStep,
        settings: Mapping[str, Any],
        allow: Sequence[str],
        *,
        start_afresh: bool,
    ) -> TrainState | None:
        """The state of the newest checkpoint, made with these settings; None without one."""
        found = self.checkpoints.restore_newest(
            train_step.state,
            accept=lambda meta: resume.require_settings(meta, settings, allow, self._workdir),
            start_afresh=start_afresh,
        )
        # Written after the settings were accepted: a refused launch leaves the workdir as it was.
        self._keep("config.json", json.dumps(plain(self._config.values), indent=1) + "\n")
        if found is None:
            return None
        state, _ = found
        log.info("resumed at step %d from %s", int(state.step), self.checkpoints.folder)
        return state

    def begin(self, step: int) -> None:
        """Opens the writers at a step; what they hold of later steps no longer counts."""
        self._writers.close()
        self._writers = run_writers(self._workdir, total=self._config.steps, step=step)
        self.clock.begin(step)

    def compile(
        self, train_step: TrainStep, system: Any, state: TrainState, frozen: Any, batch: Any
    ) -> tuple[jax.stages.Compiled, float | None]:
        """Compiles the update ahead of time, and reports what it costs."""
        with self.clock.aside("compile"):
            start = time.perf_counter()
            compiled = train_step.update.lower(state, frozen, batch).compile()
            seconds = time.perf_counter() - start
            flops = profiling.step_flops(system, compiled, self._config.batch)
            log.info(profiling.summary(state.params, compiled, seconds, flops))
            if train_step.options:
                log.info("compiler options: %s", dict(train_step.options))
        return compiled, flops

    # -------------------------------------------------------------------- in the loop

    def profiled(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Traces the step if ``config.profile`` asks for it."""
        window = self._config.profile
        return profiling.window(self._workdir / "profile", step, window.start, window.steps)

    def log(
        self, step: int, state: TrainState, reader: Batches | CachedBatches, *, leave: int
    ) -> TrainState | None:
        """Writes the window's scalars; returns the state to go back to after a fault, if so."""
        scalars, bad = self.clock.window.read(leave=leave)
        for report in reader.drain():
            log.warning("%s", report["error"])
            with (self._workdir / f"data_report{self._own}.jsonl").open("a") as file:
                file.write(json.dumps(report) + "\n")
        leaps = self._faults.spikes.among(self.clock.window.losses)
        if self._faults.spikes.count:
            scalars["spikes"] = self._faults.spikes.count
        self._writers.write(step, scalars)
        self.clock.logged(step)
        return self._after_faults(state, bad, leaps) if bad or leaps else None

    def _after_faults(self, state: TrainState, bad: list, leaps: list) -> TrainState | None:
        """Applies the policy to steps that were not finite, or leapt."""
        self.checkpoints.wait()
        saved, refused = self.checkpoints.newest(), int(state.skipped)
        if not (
            (bad and self._faults.go_back(bad, refused=refused, saved=saved))
            or (leaps and self._faults.go_back_from(leaps, saved=saved))
        ):
            return None
        retries = int(state.retries) + 1
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        found = self.checkpoints.restore_newest(abstract)
        if found is None:  # deleted by hand since it was saved
            raise UserError(f"{self.checkpoints.folder}: the checkpoint to go back to is gone.")
        state, _ = found
        log.warning("rolled back to step %d, retry %d", int(state.step), retries)
        return state.replace(retries=jnp.full_like(state.retries, retries))

    def draw(self, preview: Previewer, step: int, state: TrainState, frozen: Any) -> None:
        """Draws the fixed samples and shows them."""
        with self.clock.aside("evaluation"):
            sheet, measures = preview(state, frozen)  # every process draws its part
            if self._first:
                path = self._workdir / "samples" / f"{step:08d}.png"
                path.parent.mkdir(exist_ok=True)
                viz.save_png(path, sheet)
                self._writers.images(step, {"samples": sheet})
                line = ": ".join(filter(None, [f"preview {path}", scene_line(measures)]))
                scalars = {f"preview/{name}": value for name, value in measures.items()}
                self._writers.note(step, line, scalars)
                if not self._drawn:
                    log.info("%s", preview.hint)
                self._drawn = True

    def save(
        self, step: int, state: TrainState, settings: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Saves the state; writing goes on behind the next steps unless ``wait``."""
        with self.clock.aside("save"):
            self.checkpoints.save(step, state, {"config": settings})
            if wait:
                self.checkpoints.wait()
            self.clock.saved(step)


@dataclasses.dataclass(frozen=True)
class HostBatches:
    """The rows that this process reads, from any step on."""

    config: RunConfig
    source: Source
    tokenizer: Words | None  # of the training data; None where text is no words

    def start(self, step: int) -> Batches | CachedBatches:
        """Batches from a step on; to be closed."""
        config = self.config
        return batches(
            self.source,
            config.data,
            batch=config.batch,
            seed=config.seed,
            transforms=build.transforms(config.data),
            tokenizer=self.tokenizer.encode if self.tokenizer else None,
            start_step=step,
            host=jax.process_index(),
            hosts=jax.process_count(),
            instances=build.instances(config),
        )


def _due(step: int, every: int, last: bool) -> bool:
    """Returns True every ``every`` steps and after the last one; never if it is 0."""
    return every > 0 and (last or step % every == 0)


def _next(reader: Iterator[Batch], step: int) -> Batch:
    """The next batch.

    Raises:
      UserError: a process that reads is gone; what a reader itself raises passes unchanged.
    """
    try:
        return next(reader)
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].split(".")[0]
        raise UserError(
            f"ERROR [data] step {step}: a process that reads data ended abruptly (exit code "
            f"{code}; -9 is a kill, most often because memory ran out). Lower config.data.workers "
            "if so; the same command goes on from the newest checkpoint."
        ) from error
