"""The quickstart trained for a given time: a trial says how fast it is, a run fills the rest.

  python -m jointseg_jax.perf.bench_quickstart --launcher launch/train.py --seconds 240

1. The trial is the quickstart with few updates; it also fills the compile cache.
2. The run has as many updates as fit, so that its learning rate ends where its schedule ends; it
   generates 256 pairs and judges them. Their grid is copied to ``--grid``.

Prints one JSON object: updates, seconds and the report of the run (alignment mIoU and its chance).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jointseg_jax import jsonl
from jointseg_jax.perf import harness

TRIAL_STEPS = 200
FINISH = 40.0  # seconds for what a trial does not have: sampling and judging 256 pairs
SHARE = 0.95  # of what is left for updates: previews and checkpoints take a little


def train(launcher: str, workdir: Path, *words: str) -> tuple[float, dict]:
    """Seconds and last line of one training run.

    Raises:
      RuntimeError: it failed; with the end of what it printed.
    """
    command = [sys.executable, launcher, f"--workdir={workdir}", *words]
    start = time.monotonic()
    # Captured: the last line of this process is read by a plan.
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-3000:]}")
    return time.monotonic() - start, harness.last_object(done.stdout) or {}


def step_seconds(metrics: Path) -> float:
    """Seconds of an update by the last line that has them: the first window holds compilation."""
    return [line["step_ms"] for line in jsonl.read(metrics) if "step_ms" in line][-1] / 1e3


def main() -> None:
    """Trains twice, prints the report."""
    parser = harness.parser(__doc__)
    parser.add_argument("--launcher", required=True, help="path of launch/train.py")
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--trial_steps", type=int, default=TRIAL_STEPS)
    parser.add_argument("--grid", default="", help="where to copy the grid of pairs")
    flags = parser.parse_args()
    start = time.monotonic()
    # Made scenes are drawn by the host: one thread would keep a fast device waiting.
    words = [f"--config={flags.config}", f"--config.data.workers={min(harness.cores() // 2, 8)}"]
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial"
        short = (f"--config.steps={flags.trial_steps}", "--config.finish.num=0")
        trial_s, _ = train(flags.launcher, trial, *words, *short)
        step_s = step_seconds(trial / "metrics.jsonl")
        # What the trial took beside its updates, the run takes again.
        overhead = max(trial_s - flags.trial_steps * step_s, 0.0)
        left = flags.seconds - (time.monotonic() - start) - overhead - FINISH
        steps = max(int(SHARE * left / step_s), flags.trial_steps)
        seconds, report = train(
            flags.launcher, Path(folder) / "run", *words, f"--config.steps={steps}"
        )
        if flags.grid and "grid" in report:
            shutil.copy(report["grid"], flags.grid)
    shown = {k: v for k, v in report.items() if isinstance(v, int | float)}
    out = {"steps": steps, "step_ms": 1e3 * step_s, "trial_s": trial_s, "seconds": seconds}
    print(json.dumps(out | {"report": report, "summary": shown}))


if __name__ == "__main__":
    main()
