"""Trains what a config describes; the same command goes on where an interrupted run stopped.

  python launch/train.py --config configs/quickstart.py --workdir runs/quickstart
  python launch/train.py --config configs/pdm.py:data=folders --workdir runs/pdm \\
      --config.data.train.root=data/camvid --config.data.val.root=data/camvid --config.steps=20000

Any value of the config can be set on the command line as --config.PATH=VALUE. What a run writes
into its workdir: config.json, facts.json (classes, words), metrics.jsonl, tensorboard/, samples/
(pictures while it trains), checkpoints/. Exit status: 0 done, 2 a mistake in config or data (said
in one block), 75 stopped on SIGTERM after saving (run the same command again).

On several hosts the same command runs on each of them; launch/pod/ has scripts for SLURM, Cloud TPU
and GKE, where the processes find one another. Elsewhere say where they meet, here as two processes:
  python launch/train.py ... --coordinator=HOST:PORT --num_processes=2 --process_id=0   (and 1)
The first alone logs and reports. Should one die, the others end within seconds with a line that
says so (exit status 76, or 134 where jax aborts them): run the same command on all of them again.

What can be set, with types, defaults and meaning, for the whole config or a part of it:
  python launch/train.py --config C --help_config
  python launch/train.py --config C --help_config system.solver

Before a pod is spent: --validate goes through config, data, mesh, memory and the workdir's
checkpoint, lists everything that is wrong (exit status 2) or what was found (0), and leaves the
workdir as it is. Memory is that of the devices here, or of a TPU that need not exist:
  python launch/train.py --config C --workdir W --validate --topology v5e:4x4

Samples are drawn early and then less often (config.preview); of the embedded scenes each drawing is
measured, too (`preview/...` among the curves). A run ends with a line of where its time went,
restarts included, also kept in goodput.jsonl, and with the commands to run next; what these start
from lies in WORKDIR/examples, to be replaced by your own. A run that stands still says so, with
what it waits for and the stacks of its threads in stacks.txt.
"""

from __future__ import annotations

import logging
import runpy
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jointseg_jax import cli, distributed
from jointseg_jax.config import RunConfig
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

log = logging.getLogger("jointseg_jax")

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its arguments after a colon: configs/pdm.py:data=folders."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes.")
ALLOW = flags.DEFINE_multi_string(
    "allow", [], "Config path (regex, as steps or optimizer/.*) that a resumed run may change."
)
AFRESH = flags.DEFINE_boolean(
    "start_afresh", False, "Start from step 0 if every checkpoint of the workdir is damaged."
)
VALIDATE = flags.DEFINE_boolean("validate", False, "Check all of it; train and write nothing.")
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "validate: compile for GENERATION:SHAPE, as v5e:4x4, not for what is here."
)
SCAN = flags.DEFINE_integer(
    "scan", 2000, "validate: records of each split to read, spread evenly; 0: all.", lower_bound=0
)
cli.define_process_flags()
HELP = cli.define_optional(
    "help_config", "Print the fields of the config, or of PATH in it (system.solver), and leave."
)
flags.mark_flag_as_required("config")
flags.register_multi_flags_validator(
    ["workdir", "help_config"],
    lambda values: any(value is not None for value in values.values()),
    message="Flag --workdir must have a value other than None.",
)


def main() -> int:
    """Trains, then does what ``config.finish`` asks for; or validates, or explains the config."""
    if HELP.value is not None:
        return explain(HELP.value)
    cli.start(saves=True)
    values, workdir = CONFIG.value.to_dict(), Path(str(WORKDIR.value))
    if VALIDATE.value:
        return validate(values)
    if TOPOLOGY.value is not None:
        raise UserError("ERROR [flags] --topology is for --validate; training takes what is here.")
    from jointseg_jax import check
    from jointseg_jax.training import goodput, loop

    config, problems = check.checked(values, WORKDIR.value)
    problems.raise_if_any()
    since, start = time.time(), time.monotonic()
    try:
        status = loop.train(config, workdir, ALLOW.value, start_afresh=AFRESH.value)
        if status == 0 and config.finish.num:
            finish(config, workdir, start)
    finally:
        if distributed.is_first():
            goodput.log_summary(workdir, since=since)
    if status == 0 and distributed.is_first():
        suggest(config, workdir)
    return status


def finish(config: RunConfig, workdir: Path, start: float) -> None:
    """Generates and judges pairs, and says where everything is."""
    from jointseg_jax.evaluation.evaluate import evaluate, scalars
    from jointseg_jax.evaluation.scene_table import scene_tables
    from jointseg_jax.training import goodput
    from jointseg_jax.training.preemption import ExitOnSigterm
    from jointseg_jax.training.writers import append_scalars

    with ExitOnSigterm(), goodput.evaluation(workdir, writes=distributed.is_first()):
        report = evaluate(workdir, num=config.finish.num)
    append_scalars(workdir, report["step"], scalars(report))
    if distributed.is_first():
        print(scene_tables(report), end="")
        rows = [report, *report.get("table", [])]
        grid = next((row["grid"] for row in rows if "grid" in row), workdir / "samples")
        print(f"everything is in {workdir}: start with {Path(grid).resolve()}")
    cli.last_line(report | {"seconds": round(time.monotonic() - start, 1)})


def suggest(config: RunConfig, workdir: Path) -> None:
    """Says what to run next, with files to begin with."""
    from jointseg_jax import build
    from jointseg_jax.generation.examples import write_examples
    from jointseg_jax.generation.next_commands import next_commands
    from jointseg_jax.training.workdir import load_codecs, load_info

    try:
        examples = write_examples(config, workdir)
    except (UserError, BadSample) as error:  # such as a run that needed its cache alone
        log.info("no commands to run next, for want of examples: %s", error)
        return
    info, (codecs, _) = load_info(workdir), load_codecs(workdir, config.system)
    system = build.system(config.system, info, codecs)
    own = own_data(flags.FLAGS["config"].config_filename)
    commands = next_commands(config, system, workdir, examples, own)
    log.info("what to run next:\n%s", "\n".join(map(str, commands)))


OWN_DATA = "configs/pdm.py:data=folders"
"""Reads a person's own folder and needs no other run."""


def own_data(name: str) -> str:
    """A config that reads data in folders: that of a name with other data, or ``OWN_DATA``."""
    path, _, argument = name.partition(":")
    kept = [part for part in argument.split(",") if part.partition("=")[0] not in DATA_ARGUMENTS]
    argument = ",".join([*kept, "data=folders"])
    try:
        found = RunConfig.parse(runpy.run_path(path)["get_config"](argument).to_dict())
    except (LookupError, TypeError, ValueError, UserError):  # a config that takes no such argument
        return OWN_DATA
    alone = found.start.is_fresh and not found.system.trained_codecs()
    return f"{path}:{argument}" if alone else OWN_DATA


DATA_ARGUMENTS = ("", "data", "smoke")
"""Arguments of a config that choose its data."""


def validate(values: dict[str, Any]) -> int:
    """Prints what a run would find."""
    from jointseg_jax.validate import validate as validated

    findings = validated(
        values, str(WORKDIR.value), topology=TOPOLOGY.value, limit=SCAN.value, allow=ALLOW.value
    )
    if findings.problems:
        raise UserError(findings.page())
    if distributed.is_first():
        print(findings.page(), flush=True)
    return 0


def explain(path: str) -> int:
    """Prints the fields that a config has at a path: types, defaults, what they mean."""
    from jointseg_jax.config_help import config_help

    print(config_help(CONFIG.value.to_dict(), path))
    return 0


def config_problems() -> list[str]:
    """What is wrong with the config, to be reported with what is wrong with the command line."""
    from jointseg_jax import check

    if CONFIG.value is None:
        return []
    return check.checked(CONFIG.value.to_dict(), WORKDIR.value)[1]


if __name__ == "__main__":
    cli.run(main, config_problems)
