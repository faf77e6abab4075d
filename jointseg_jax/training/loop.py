"""The training loop: any system, one order.

build -> shapes -> match rules -> restore *or* init into shardings, with what ``config.start`` names
-> compile the update ahead of time -> for each step {next batch, update, log the window, preview,
evaluate, save} -> final save.

Everything random is a function of (seed, step, global row), the data position is the step, so a
resumed run continues bit for bit. The host reads from the device at log points only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jointseg_jax import build, profiling, sharding
from jointseg_jax.annotations import viz
from jointseg_jax.data import files
from jointseg_jax.data.pipeline import batches
from jointseg_jax.training import init_from, pretrained, resume
from jointseg_jax.training import state as states
from jointseg_jax.training.checkpoints import Checkpoints
from jointseg_jax.training.clock import Telemetry
from jointseg_jax.training.digest import state_digest
from jointseg_jax.training.faults import Faults
from jointseg_jax.training.flight import InFlight
from jointseg_jax.training.goodput import Goodput
from jointseg_jax.training.lock import WorkdirLock
from jointseg_jax.training.preemption import STOPPED, Preemption
from jointseg_jax.training.preview import previewer
from jointseg_jax.training.program import check_batch, make_program
from jointseg_jax.training.watchdog import Watchdog
from jointseg_jax.training.workdir import load_codecs, trained_codecs
from jointseg_jax.training.writers import run_writers
from jointseg_jax.types import UserError

log = logging.getLogger("jointseg_jax")


def train(
    config: Mapping[str, Any],
    workdir: Path,
    allow: Sequence[str] = (),
    *,
    start_afresh: bool = False,
) -> int:
    """Trains to ``config.steps`` and returns the exit status.

    Args:
      config: plain nested mapping.
      workdir: where everything about the run is kept; the same workdir resumes.
      allow: regexes of config paths (``optimizer/schedule/lr``) that may differ from those the
        checkpoint was made with; the run then is no longer one that a straight run would equal.
      start_afresh: from step 0 if every checkpoint is damaged, which otherwise ends the run.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    watchdog = Watchdog(**config.get("watchdog", {}), stacks=workdir / f"stacks{_own()}.txt")
    with WorkdirLock(workdir), Preemption() as preemption, watchdog:
        return _Run(config, workdir, preemption, watchdog, allow, start_afresh).train()


class _Run:
    """One process's part of a run, in the fixed order of the module docstring."""

    def __init__(
        self,
        config: Mapping[str, Any],
        workdir: Path,
        preemption: Preemption,
        watchdog: Watchdog,
        allow: Sequence[str],
        start_afresh: bool,
    ):
        self.allow, self.start_afresh = allow, start_afresh
        self.config, self.workdir, self.preemption = config, workdir, preemption
        self.goodput = Goodput(workdir, writes=jax.process_index() == 0)
        self.watchdog = watchdog
        watchdog.doing = lambda: self.goodput.phase
        self.mesh = sharding.make_mesh(config["mesh"])
        check_batch(config, self.mesh)
        self.faults = Faults(**config.get("nan", {}))
        self.source = build.source(config, "train")
        self.info = self._facts()
        self.transforms = build.transforms(config)
        self.tokenizer = build.tokenizer(config, self.info.vocabulary)
        if trained_codecs(config):
            pretrained.from_cache(workdir, config)
            with self._batches(0) as host:
                pretrained.import_codecs(workdir, config, self.info, host)
        specs, self.frozen = load_codecs(workdir, config)
        self.system = build.system(config, self.info, specs)
        self.program = make_program(self.system, config, self.mesh)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep=config["checkpoint"]["keep"],
        )

    # ------------------------------------------------------------------- set-up

    def _facts(self) -> build.DatasetInfo:
        known, path = build.dataset_info(self.source), self.workdir / "facts.json"
        if path.exists():
            resume.require_info(known, path)
        else:
            self._keep("facts.json", known.dump())
        return known

    def _keep(self, name: str, text: str) -> None:
        """A small file of the workdir, whole or absent, written by one process."""
        if jax.process_index() == 0:
            files.write(self.workdir / name, text.encode())

    def _batches(self, start: int) -> Any:
        data = self.config["data"]
        return batches(
            self.source,
            batch=self.config["batch"],
            seed=self.config["seed"],
            transforms=self.transforms,
            tokenizer=self.tokenizer.encode if self.tokenizer else None,
            start_step=start,
            workers=data.get("workers", 0),
            threads=data.get("threads", 2),
            prefetch=data.get("prefetch", 4),
            host=jax.process_index(),
            hosts=jax.process_count(),
            bad=data.get("bad", "replace"),
            bad_limit=data.get("bad_limit", 100),
            instances=build.instances(self.config),
        )

    def _prepare(self) -> states.TrainState:
        """The newest checkpoint, or fresh parameters and what ``config.start`` names."""
        found = self.checkpoints.restore_newest(
            self.program.state, accept=self._accept, start_afresh=self.start_afresh
        )
        self._keep("config.json", _dump(self.config))
        if found is None:
            given = init_from.load(self.config.get("start", {}), self.program.params, self.info)
            init = jax.jit(self.program.init, out_shardings=self.program.shardings)
            return init(jax.random.key(self.config["seed"]), given)
        restored, _ = found
        log.info("resumed at step %d from %s", int(restored.step), self.checkpoints.folder)
        return restored

    def _accept(self, meta: Mapping[str, Any]) -> None:
        resume.require_settings(meta, self._meta(), self.allow, self.workdir)

    def _meta(self) -> dict[str, Any]:
        return resume.settings(self.config, self.source)

    def _previewer(self) -> Callable[[int, states.TrainState], None]:
        draw = previewer(
            self.system, self.config, self.info, self.mesh, self.transforms, self.tokenizer
        )

        def write(step: int, state: states.TrainState) -> None:
            self.goodput.enter("evaluation")
            sheet = draw(state, self.frozen)  # every process draws its part
            if jax.process_index():
                return
            folder = self.workdir / "samples"
            folder.mkdir(exist_ok=True)
            viz.save_png(folder / f"{step:08d}.png", sheet)
            self.writers.images(step, {"samples": sheet})

        return write

    def _compile(self, state: states.TrainState, batch: Any) -> Callable:
        self.goodput.enter("compile")
        start = time.perf_counter()
        compiled = self.program.update.lower(state, self.frozen, batch).compile()
        self.flops = profiling.step_flops(self.system, compiled, self.config["batch"])
        log.info(profiling.summary(state.params, compiled, time.perf_counter() - start, self.flops))
        if self.program.options:
            log.info("compiler options: %s", dict(self.program.options))
        return compiled

    # --------------------------------------------------------------------- loop

    def train(self) -> int:
        with jax.set_mesh(self.mesh):
            state = self._prepare()
            self.frozen = jax.device_put(self.frozen, sharding.replicated(self.mesh))
            self.writers = None
            self._open_writers(int(state.step))
            try:
                state, status = self._steps(state)
            finally:
                self.checkpoints.close()
                self.writers.close()
        if status == 0:
            log.info("done: step %d, digest %s, in %s", int(state.step), self.digest, self.workdir)
        return status

    def _steps(self, state: states.TrainState) -> tuple[states.TrainState, int]:
        steps, step = self.config["steps"], int(state.step)
        every = {k: self.config[k]["every"] for k in ("log", "preview", "checkpoint")}
        host = self._batches(step)
        compiled = preview = telemetry = None
        flight = InFlight()
        try:
            while step < steps:
                start = time.perf_counter()
                self.watchdog.alive(step)
                self.goodput.enter("data")
                rows = _next(host, step)
                indices, batch = rows["index"], sharding.global_batch(rows, self.mesh)
                if compiled is None:
                    compiled, preview = self._compile(state, batch), self._previewer()
                    start = time.perf_counter()
                    telemetry = self._telemetry()
                behind = flight.busy()  # while the devices work, reading costs no time
                telemetry.waited(0.0 if behind else time.perf_counter() - start)
                self.goodput.enter("step", behind=behind)
                with self._profiled(step):
                    state, metrics = compiled(state, self.frozen, batch)
                telemetry.add(step, metrics, indices)
                flight.add(metrics)
                step += 1
                if step % every["log"] == 0 or step == steps:
                    state = self._log(step, state, telemetry, host, leave=int(step < steps))
                    if self._rolled_back:
                        step = int(state.step)
                        host.close()
                        host, telemetry = self._batches(step), self._telemetry()
                        self._open_writers(step)
                        continue
                self.checkpoints.check()
                paused = telemetry.pause()
                if every["preview"] and (step % every["preview"] == 0 or step == steps):
                    preview(step, state)
                if step % every["checkpoint"] == 0 or step == steps:
                    self._save(step, state, wait=step == steps)
                telemetry.resume(paused)
                if self.preemption.requested(step):
                    if step % every["checkpoint"] and step < steps:
                        self._save(step, state, wait=True)
                    log.info("stopped on request at step %d; the same command goes on", step)
                    return state, 0 if step == steps else STOPPED
            self.digest = state_digest(state)
            return state, 0
        finally:
            host.close()

    def _telemetry(self) -> Telemetry:
        return Telemetry(total=self.config["steps"], batch=self.config["batch"], flops=self.flops)

    def _open_writers(self, step: int) -> None:
        """Opens the writers at a step; what they hold of later steps no longer counts."""
        if self.writers is not None:
            self.writers.close()
        self.writers = run_writers(self.workdir, total=self.config["steps"], step=step)
        self.goodput.begin(step)

    def _save(self, step: int, state: states.TrainState, *, wait: bool) -> None:
        self.goodput.enter("save")
        self.checkpoints.save(step, state, {"config": self._meta()})
        if wait:
            self.checkpoints.wait()
        self.goodput.reached(step)

    def _log(
        self, step: int, state: states.TrainState, telemetry: Telemetry, host: Any, *, leave: int
    ) -> states.TrainState:
        """Writes the window's scalars; applies the policy for steps that were not finite."""
        self._rolled_back = False
        scalars, bad = telemetry.read(leave=leave)
        for report in host.drain():
            log.warning("%s", report["error"])
            with (self.workdir / f"data_report{_own()}.jsonl").open("a") as file:
                file.write(json.dumps(report) + "\n")
        leaps = self.faults.spikes.among(telemetry.losses)
        if self.faults.spikes.count:
            scalars["spikes"] = self.faults.spikes.count
        self.writers.write(step, scalars)
        self.goodput.logged(step)
        return self._faulty(state, bad, leaps) if bad or leaps else state

    def _faulty(self, state: states.TrainState, bad: list, leaps: list) -> states.TrainState:
        """The state to go on from after steps that were not finite, or leapt."""
        saved, refused = self._last_saved(), int(state.skipped)
        if not (
            (bad and self.faults.go_back(bad, refused=refused, saved=saved))
            or (leaps and self.faults.go_back_from(leaps, saved=saved))
        ):
            return state
        retries = int(state.retries) + 1
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        state, _ = self.checkpoints.restore_newest(abstract)
        self._rolled_back = True
        log.warning("rolled back to step %d, retry %d", int(state.step), retries)
        return state.replace(retries=jnp.full_like(state.retries, retries))

    def _last_saved(self) -> int | None:
        self.checkpoints.wait()
        return self.checkpoints.newest()

    def _profiled(self, step: int) -> Any:
        window = self.config.get("profile", {"start": -1, "steps": 0})
        return profiling.window(self.workdir / "profile", step, window["start"], window["steps"])


def _next(host: Any, step: int) -> dict[str, Any]:
    """The next batch.

    Raises:
      UserError: a process that reads is gone; what a reader itself raises passes unchanged.
    """
    try:
        return next(host)
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].split(".")[0]
        raise UserError(
            f"ERROR [data] step {step}: a process that reads data ended abruptly (exit code "
            f"{code}; -9 is a kill, most often for want of memory). Lower config.data.workers if "
            "so; the same command goes on from the newest checkpoint."
        ) from error


def _own() -> str:
    """What tells the files of this process from those of the first."""
    return f".{jax.process_index()}" if jax.process_index() else ""


def _dump(config: Mapping[str, Any]) -> str:
    return json.dumps(build.plain(config), indent=1) + "\n"
