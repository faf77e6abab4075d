"""Compiles a config's real program for a TPU topology, without a TPU, and says whether it fits.

  python launch/compile.py --config configs/quickstart.py --topology v5e:2x2
  python launch/compile.py --config configs/pdm.py:data=coco_panoptic --topology v5e:16x16 \\
      --batch_per_chip 32
  python launch/compile.py --config configs/jodiffusion.py:data=voc \\
      --codec configs/jodiffusion_codec.py:data=voc --topology v5p:4x4x4 --batch_per_chip 8 \\
      --config.mesh="(8,8,1)" --config.sharding=fsdp --remat full --scan
  python launch/compile.py --config configs/pdm.py:data=coco_panoptic --topology v5e:1x1 \\
      --what sample --batch_per_chip 16
  python launch/compile.py --config configs/jodiffusion.py:data=voc \\
      --codec configs/jodiffusion_codec.py:data=voc --topology v5e:16x16 --sweep --scan

Needs libtpu (pip install 'jointseg_jax[tpu]'), a CPU and 2 to 10 GB of memory; the time depends on
the program, not on the number of chips: seconds to minutes. Neither data nor checkpoints have to be
on this machine (--classes and --codec say what cannot be known without them).

With --cached, training reads latents instead of encoding in each step, as from a cache that is
still to be made (launch/encode.py). Of one that there is, --config.data.cache=DIR, DIR/train.json
and DIR/frozen/*.json are enough.

How to read the page:
  HBM            the compiler's plan for one chip; it refuses what does not fit, as a chip would.
                 GiB. peak above 85 % leaves little for anything else.
  collectives    what chips send each other, per chip and run, loops counted; GB = 10^9 bytes.
                 With sharding=replicate: one all-reduce of the gradients. fsdp: all-gathers of the
                 parameters too. Samplers need none.
  matmul FLOPs   of the optimized program. More than analytic: recomputation (remat full: 4/3),
                 padding, codecs that run inside the program.
                 With attention by a kernel (not in the text) both are without attention.
  estimate       the compiler's cycles / clock. For comparing programs, never a measured time.
                 Leaves out Pallas kernels (listed), so with such attention it is the time of
                 everything else; and waiting for other chips.
  kernels, step  those kernels by their own schedules (python -m jointseg_jax.perf.schedule), and
                 the sum of all with nothing hidden: what --sweep compares programs by.
  N x N buffers  arrays as long as the tokens on two axes, which fast attention does not have.
  roofline       analytic FLOPs at the chip's peak.

--sweep compiles the update with every combination of --sweep_attention, --sweep_sharding,
--sweep_remat and --sweep_rows (rows per chip go up until they do not fit in 85 % of HBM), prints a
row for each, and the config lines of the one with the least estimated time per image. Compiling
with few layers first, --config.system.denoiser.depth=4, is quicker and mostly ranks the same.

The last line of output is one JSON object: fits, estimate_ms, roofline_ms, hbm_gb, collective_gb,
compile_s and all else on the page. Exit status: 0 it fits, 1 it does not, 2 a mistake in the flags.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jointseg_jax import cli
from jointseg_jax.config import RunConfig, SystemConfig
from jointseg_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with its arguments after a colon; fields as --config.PATH=VALUE."
)
CODEC = config_flags.DEFINE_config_file(
    "codec", None, "The config that would train the codec this config takes from a run not here."
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "GENERATION:SHAPE, as v5e:2x2, v5e:16x16, v5p:4x4x4, v5p:16x16x16, v6e:16x16."
)
WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "The update, or the sampler.")
PER_CHIP = flags.DEFINE_integer(
    "batch_per_chip",
    None,
    "Rows per data-parallel shard; default: config.batch over all (train), 16 (sample).",
    lower_bound=1,
)
STEPS = flags.DEFINE_integer("steps", None, "sample: solver steps, not the config's.", 1)
GIVEN = flags.DEFINE_enum(
    "given", None, ["image", "labels"], "sample: what pairs start from, where a run needs it."
)
CLASSES = flags.DEFINE_integer(
    "classes", None, "Number of classes, for data that are not on this machine.", lower_bound=1
)
CACHED = flags.DEFINE_bool("cached", False, "train: latents come from launch/encode.py's cache.")
REMAT = flags.DEFINE_enum(
    "remat", None, ["none", "dots", "attn_out", "full"], "Sets system.denoiser.remat."
)
SCAN = flags.DEFINE_bool("scan", None, "Sets system.denoiser.scan.")
ATTENTION = flags.DEFINE_string("attention", None, "Sets system.denoiser.attention.")
OPTIONS = flags.DEFINE_list(
    "compiler_options",
    [],
    "XLA's, as xla_tpu_scoped_vmem_limit_kib=16384, over those of the generation "
    "(jointseg_jax/chips.py), which a run on such chips has too.",
)
HLO = flags.DEFINE_string("hlo", None, "File to write the optimized program's text to.")
SWEEP = flags.DEFINE_bool("sweep", False, "Tries settings and picks the best; see above.")
SWEEP_ATTENTION = flags.DEFINE_list(
    "sweep_attention", ["auto"], "Of --sweep: auto, xla, packed, splash."
)
SWEEP_SHARDING = flags.DEFINE_list(
    "sweep_sharding", ["zero1", "fsdp"], "Of --sweep: replicate, zero1, fsdp, fsdp+model."
)
SWEEP_REMAT = flags.DEFINE_list(
    "sweep_remat", ["none", "dots", "full"], "Of --sweep: none, dots, attn_out, full."
)
SWEEP_ROWS = flags.DEFINE_list("sweep_rows", ["2", "4", "8", "16"], "Of --sweep: rows per chip.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> int:
    """Lowers, compiles, prints."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # what the program is lowered on; nothing runs
    from jointseg_jax import chips
    from jointseg_jax.perf import abstract, page, programs, report

    chip = chips.chip_of(TOPOLOGY.value)
    options = dict(chip.options) | _options(OPTIONS.value)
    devices = chips.devices_of(TOPOLOGY.value)
    config = RunConfig.parse(CONFIG.value.to_dict())
    config = abstract.with_denoiser(
        config, remat=REMAT.value, scan=SCAN.value, attention=ATTENTION.value
    )
    codec = SystemConfig.parse(CODEC.value.to_dict()["system"]) if CODEC.value else None
    missing = programs.Missing(classes=CLASSES.value, codec=codec, cached=CACHED.value)
    if SWEEP.value:
        return _sweep(config, devices, missing, options)
    if WHAT.value == "train":
        if STEPS.value or GIVEN.value:
            raise UserError("ERROR [flags] --steps and --given are for --what=sample.")
        lowered = programs.lower_training(config, devices, missing=missing, per_chip=PER_CHIP.value)
    else:
        if CACHED.value:
            raise UserError("ERROR [flags] --cached is for --what=train.")
        lowered = programs.lower_sampling(
            config,
            devices,
            missing=missing,
            per_chip=PER_CHIP.value,
            steps=STEPS.value,
            given=GIVEN.value,
        )
    made, text = report.compiled(lowered, chip, options)
    if HLO.value and text:
        Path(HLO.value).write_text(text)
    source = flags.FLAGS["config"].config_filename
    print(page.report_page(made, f"{WHAT.value} of {source} on {TOPOLOGY.value}"))
    names = {"config": source, "what": WHAT.value, "topology": TOPOLOGY.value}
    cli.last_line(names | made.values())
    return 0 if made.memory is not None else 1


def _sweep(config: RunConfig, devices: list[Any], missing: Any, options: dict[str, str]) -> int:
    """Prints the table of a sweep; 1 if nothing fits."""
    from jointseg_jax import chips
    from jointseg_jax.perf import sweep

    fixed = {"what=sample": WHAT.value == "sample", "batch_per_chip": PER_CHIP.value}
    fixed |= {"remat": REMAT.value, "attention": ATTENTION.value, "hlo": HLO.value}
    if given := [f"--{k}" for k, v in fixed.items() if v]:
        raise UserError(f"ERROR [flags] {', '.join(given)}: --sweep tries these itself.")
    if not all(rows.isdigit() and int(rows) for rows in SWEEP_ROWS.value):
        raise UserError(f"ERROR [flags] --sweep_rows={','.join(SWEEP_ROWS.value)}: give numbers.")
    grid = sweep.Grid(
        attention=SWEEP_ATTENTION.value,
        sharding=SWEEP_SHARDING.value,
        remat=SWEEP_REMAT.value,
        rows=[int(rows) for rows in SWEEP_ROWS.value],
    )
    source = flags.FLAGS["config"].config_filename
    print(f"sweep of {source} on {TOPOLOGY.value}: up to {len(grid)} programs\n{sweep.COLUMNS}")
    tried = []
    chip = chips.chip_of(TOPOLOGY.value)
    for trial in sweep.trials(config, devices, chip, grid, missing=missing, options=options):
        print(sweep.line(trial), flush=True)
        tried.append(trial)
    best = sweep.best(tried)
    if best is None:
        print("\nNothing fits: more chips, fewer rows (--sweep_rows=1), or --sweep_sharding=fsdp.")
    else:
        print("\nLeast estimated time per image, and it fits:", sweep.line(best), sep="\n")
        print(*sweep.lines_to_use(best), sep="\n")
    names = {"config": source, "what": "sweep", "topology": TOPOLOGY.value}
    found = {"best": sweep.values(best) if best else None, "tried": [*map(sweep.values, tried)]}
    cli.last_line(names | found)
    return 0 if best else 1


def _options(given: list[str]) -> dict[str, str]:
    wrong = [option for option in given if "=" not in option]
    if wrong:
        raise UserError(f"ERROR [flags] --compiler_options: {wrong[0]!r}: write NAME=VALUE.")
    return dict(option.split("=", 1) for option in given)


if __name__ == "__main__":
    cli.run(main)
