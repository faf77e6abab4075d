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
"""

from __future__ import annotations

import time
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jointseg_jax import cli, peers

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its arguments after a colon: configs/pdm.py:data=folders."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same folder resumes.")
ALLOW = flags.DEFINE_multi_string(
    "allow", [], "Config path (regex, as steps or optimizer/.*) that a resumed run may change."
)
cli.define_process_flags()
flags.mark_flags_as_required(["config", "workdir"])


def main() -> int:
    """Trains, then does what ``config.finish`` asks for."""
    start = time.monotonic()
    cli.start(saves=True)
    from jointseg_jax.training.loop import train

    config = CONFIG.value.to_dict()
    workdir = Path(WORKDIR.value)
    status = train(config, workdir, ALLOW.value)
    if status == 0 and config["finish"]["num"]:
        from jointseg_jax.evaluation.loop import evaluate

        report = evaluate(workdir, num=config["finish"]["num"])
        if peers.is_first():
            grid = report.get("grid", workdir / "samples")
            print(f"everything is in {workdir}: start with {grid}")
        cli.last_line(report | {"seconds": round(time.monotonic() - start, 1)})
    return status


if __name__ == "__main__":
    cli.run(main)
