"""Measures how fast a config runs on this machine: training, sampling, input, codecs, clean-up.

  python launch/benchmark.py --config configs/quickstart.py
  python launch/benchmark.py --config configs/pdm.py:data=coco_panoptic --what sample --batch 64
  python launch/benchmark.py --config configs/quickstart.py \\
      --against configs/quickstart.py --against.system.denoiser.remat=full
  python launch/benchmark.py --config configs/pdm.py:data=folders --what data
  python launch/benchmark.py --what masks

  --what    measures
  train     the update with the config's mesh, batch, optimizer and rules; random batches, or
            (--data) those of the config's own pipeline, with the time spent waiting for them
  sample    the sampler, and pairs all the way to their files
  data      one pair on one core, the pipeline, and the wait for it in a step of --step_ms
  codec     the codecs of the config: encode, decode, and what a round trip keeps
  masks     clean-up of label maps against the original's algorithm; needs no config
  startup   launch/train.py from its start to the first update, with an empty compile cache and
            with a full one

--plan gpu runs what one GPU is asked in --plan_minutes (10), most valuable first, and skips what
no longer fits: numerics of its attention, training and sampling of JoDiffusion's size and of
PDM-S, the same network in torch where that is installed, the quickstart trained for four minutes.
Each in a process of its own; OUT/JOB.json after each, OUT/summary.json and a table at the end.
  python launch/benchmark.py --plan gpu --out runs/gpu
  JAX_PLATFORMS=cpu python launch/benchmark.py --plan gpu --smoke --out runs/smoke      tiny sizes

Neither data nor checkpoints have to be there (but for --data and data): weights and batches are
random; --classes and --codec say what cannot be known without data, as in launch/compile.py.
--workdir RUN takes a trained run instead of --config (sample, codec).

How to read the page:
  first, warm-up   calls that do not count; median, min and max are of the repetitions, a repetition
                   being the mean of several calls in a row. Compilation is listed apart.
  model FLOPs      train: 3 x forward (3.5 with self-conditioning), no credit for recomputation,
                   codecs or optimizer. sample: forward x calls of the network.
  MFU              model FLOPs / time / the fastest matrix product measured on this machine in the
                   network's number type; and of the maker's bfloat16 peak, where it is known.
  operations       read from a trace of one call after the measurement.

--against C2 measures two configs in turns, A B A B ..., and prints the ratio of their medians with
its spread; on CPU each in a process of its own. Its fields are set by --against.PATH=VALUE, those
of the first by --config.PATH=VALUE. Two configs on an accelerator share its memory.

The last line of output is one JSON object with all that is on the page. Single host.
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jointseg_jax import cli
from jointseg_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its arguments after a colon; fields as --config.PATH=VALUE."
)
AGAINST = config_flags.DEFINE_config_file(
    "against", None, "A second config, measured in turns with the first."
)
CODEC = config_flags.DEFINE_config_file(
    "codec", None, "The config that would train the codec this config takes from a run not here."
)
WHAT = flags.DEFINE_enum(
    "what", "train", ["train", "sample", "data", "codec", "masks", "startup"], "See above."
)
flags.DEFINE_bool("data", False, "train: batches of the config's data, not random ones.")
flags.DEFINE_integer(
    "batch", None, "Rows over all chips; default: config.batch, sample: 16 a chip, codec: 8.", 1
)
flags.DEFINE_integer("steps", None, "sample: solver steps, not the config's.", 1)
flags.DEFINE_enum(
    "given", None, ["image", "labels"], "sample: what pairs start from, where a run needs it."
)
WORKDIR = flags.DEFINE_string("workdir", None, "sample, codec: a trained run, not a config.")
flags.DEFINE_integer(
    "classes", None, "Number of classes, for data that are not on this machine.", lower_bound=1
)
flags.DEFINE_integer("size", 512, "masks: side of the maps in pixels.", lower_bound=32)
flags.DEFINE_integer("area", 50, "masks: regions of fewer pixels are absorbed.", 2)
flags.DEFINE_float("step_ms", 100.0, "data: length of the synthetic step.", 1.0)
REPETITIONS = flags.DEFINE_integer("repetitions", None, "Default: 5; startup: 3.", lower_bound=1)
flags.DEFINE_integer("warmups", 2, "Calls after the first that do not count.", 0)
flags.DEFINE_integer("calls", None, "In one repetition; default: about a second's.", 1)
flags.DEFINE_bool(
    "cached", False, "train: random latents, as from launch/encode.py's cache, not label maps."
)
REMAT = flags.DEFINE_enum(
    "remat", None, ["none", "dots", "attn_out", "full"], "train: sets system.denoiser.remat."
)
ATTENTION = flags.DEFINE_string("attention", None, "train, sample: sets system.denoiser.attention.")
flags.DEFINE_bool("trace", True, "train, sample: a trace of one more call.")
CACHE = flags.DEFINE_bool("cache", False, "Let compiled programs come from the compile cache.")

PLAN = flags.DEFINE_enum("plan", None, ["gpu"], "A fixed list of benchmarks; see above.")
MINUTES = flags.DEFINE_float("plan_minutes", 10.0, "plan: time for all of it.", 0.0)
JOBS = flags.DEFINE_list("plan_jobs", [], "plan: these jobs alone.")
SMOKE = flags.DEFINE_bool("smoke", False, "plan: tiny sizes, to see that every job works.")
OUT = flags.DEFINE_string("out", None, "plan: folder for its files; default: runs/gpu-DATE.")

ONLY = {
    "data": ("train",),
    "cached": ("train",),
    "remat": ("train",),
    "attention": ("train", "sample"),
    "trace": ("train", "sample"),
    "steps": ("sample",),
    "given": ("sample",),
    "workdir": ("sample", "codec"),
    "size": ("masks",),
    "area": ("masks",),
    "step_ms": ("data",),
    "batch": ("train", "sample", "data", "codec", "startup"),
}
"""Flags that only some jobs know."""


def main() -> int:
    """Measures, prints."""
    if PLAN.value is not None:
        return _plan()
    _check()
    from jointseg_jax.perf import bench, page

    cli.use_compile_cache()
    bench.set_cache(CACHE.value)
    benches = [_bench_config("config", CONFIG.value)]
    if AGAINST.value is not None:
        benches.append(_bench_config("against", AGAINST.value))
    count = REPETITIONS.value or (3 if WHAT.value == "startup" else 5)
    results = bench.interleave(benches, count, lambda text: print(text, file=sys.stderr))
    print(page.bench_page(results, WHAT.value))
    found = {"what": WHAT.value, "machine": results[0].machine, **results[0].values()}
    if len(results) > 1:
        ratio = bench.ratios(*results)
        print(page.comparison(*results, ratio))
        found |= {"against": results[1].values(), "ratio": ratio}
    cli.last_line(found)
    return 0


def _plan() -> int:
    """Runs the plan; 1 if a part of it failed. No device is touched here: the parts need it."""
    from jointseg_jax.perf import plan

    out = Path(OUT.value or f"runs/{PLAN.value}-{datetime.date.today().isoformat()}")
    jobs = plan.gpu_jobs(out, smoke=SMOKE.value)
    if unknown := set(JOBS.value) - {job.name for job in jobs}:
        names = ", ".join(job.name for job in jobs)
        raise UserError(f"ERROR [flags] --plan_jobs={','.join(unknown)}: there are {names}.")
    summary = plan.run_plan(
        [job for job in jobs if not JOBS.value or job.name in JOBS.value],
        out,
        minutes=MINUTES.value,
        cwd=Path(__file__).parents[1],
        log=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(plan.table(summary))
    cli.last_line(summary | {"out": str(out)})
    return int(any(row["status"] in ("failed", "out of time") for row in summary["rows"]))


def _check() -> None:
    """Refuses flags that do not belong together, all of them at once."""
    what, values = WHAT.value, flags.FLAGS
    found = [
        f"--{name} is for --what={' or '.join(jobs)}."
        for name, jobs in ONLY.items()
        if values[name].present and what not in jobs
    ]
    needed = what != "masks" and WORKDIR.value is None
    if needed and CONFIG.value is None:
        found.append(f"--what={what} needs --config=FILE.")
    if not needed and AGAINST.value is not None:
        found.append("--against compares two configs; --config=FILE is missing.")
    if WORKDIR.value is not None and (REMAT.value or ATTENTION.value):
        found.append("--remat and --attention change --config; a --workdir is as it was trained.")
    if WORKDIR.value is not None and CONFIG.value is not None:
        found.append("--workdir takes the place of --config; give one of them.")
    if found:
        raise UserError("\n".join(f"ERROR [flags] {text}" for text in found))


def _bench_config(flag: str, config: Any) -> Any:
    """What is measured of one config."""
    from jointseg_jax.config import RunConfig
    from jointseg_jax.perf import abstract
    from jointseg_jax.perf.harness import BenchConfig

    values = config.to_dict() if config is not None else {}
    changes = {"remat": REMAT.value, "attention": ATTENTION.value}
    if config is not None and any(changes.values()):
        values = dict(abstract.with_denoiser(RunConfig.parse(values), **changes).values)
    # Fields are called as the flags; without a flag they have their own defaults.
    names = [field.name for field in dataclasses.fields(BenchConfig)]
    given = {k: flags.FLAGS[k].value for k in names if k in flags.FLAGS}
    given |= {"config": values, "codec": CODEC.value.to_dict() if CODEC.value is not None else {}}
    return BenchConfig(
        name=WORKDIR.value or ("label maps" if config is None else _called(flag)),
        launcher=str(Path(__file__).with_name("train.py")),
        **{k: v for k, v in given.items() if v is not None},
    )


def _called(flag: str) -> str:
    """The file of a config and what the command line changed in it."""
    source = flags.FLAGS[flag].config_filename
    changes = [a.removeprefix(f"--{flag}.") for a in sys.argv[1:] if a.startswith(f"--{flag}.")]
    return " ".join([source, *changes])


if __name__ == "__main__":
    cli.run(main)
