"""Tries settings of a training run on a topology, and picks the fastest that fits.

1. Tried are all combinations of attention, sharding, remat and rows per chip. Rows go up; once a
   number of them does not fit, larger ones are left out.
2. It fits if the compiler takes it and its peak is below ``report.TIGHT`` of HBM.
3. The best has the least ``image_ms`` (``report``: computation by the compiler's cycles, attention
   kernels by a rule of thumb, collectives at full speed, nothing hidden); of equals, the smaller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from jointseg_jax.chips import Chip
from jointseg_jax.config import RunConfig
from jointseg_jax.perf import abstract, programs, report
from jointseg_jax.perf.harness import Values
from jointseg_jax.types import UserError

HEADS = 2
"""Chips over which ``fsdp+model`` splits heads and hidden units, unless the mesh says."""

GROUP = 16
"""Chips over which ``fsdp`` splits the state, unless the config's mesh says: kernels of 1024 and
more rows keep at least 64 on each."""


class Setting(NamedTuple):
    """What a sweep changes."""

    attention: str
    sharding: str
    remat: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values to try."""

    attention: Sequence[str]
    sharding: Sequence[str]
    remat: Sequence[str]
    rows: Sequence[int]

    def __len__(self) -> int:
        return math.prod(map(len, vars(self).values()))


class Trial(NamedTuple):
    """One setting, its mesh, and what came of it: a report, or why there is none."""

    setting: Setting
    mesh: tuple[int, ...]
    report: report.Report | None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Returns True if the compiler took it and its peak is at most ``TIGHT`` of HBM."""
        made = self.report
        if made is None or made.memory is None:
            return False
        return made.memory.peak <= report.TIGHT * made.chip.hbm

    @property
    def order(self) -> tuple[float, int]:
        """What the best is chosen by: least ``image_ms``, then fewest rows."""
        time = self.report.figures.get("image_ms", math.nan) if self.report else math.nan
        return (math.inf if math.isnan(time) else time, self.setting.rows)


def configured(config: RunConfig, setting: Setting, chips: int) -> RunConfig:
    """The config with a setting; its mesh is kept where it splits state as the setting asks."""
    changed = abstract.with_denoiser(config, remat=setting.remat, attention=setting.attention)
    _, fsdp, model = mesh = tuple(changed.mesh)
    # A mesh that splits what the preset splits is the user's choice and stays.
    axes = setting.sharding.split("+")
    if "model" in axes and model == 1:
        model = min(HEADS, chips)
    if ("fsdp" in axes) != (fsdp != 1):
        fsdp = min(GROUP, chips // model) if "fsdp" in axes else 1
    if (fsdp, model) != mesh[1:]:
        mesh = (-1, fsdp, model)
    # Chips along ``model`` share the rows of one shard.
    rows = setting.rows * chips // mesh[2]
    return changed.replace({"mesh": mesh, "sharding": setting.sharding, "batch": rows})


def trials(
    config: RunConfig,
    devices: Sequence[jax.Device],
    chip: Chip,
    grid: Grid,
    *,
    missing: programs.Missing,
    options: Mapping[str, str],
    compiled: Callable = report.compiled,
) -> Iterator[Trial]:
    """Compiles one setting after the other.

    Args:
      compiled: compiles a lowered program, as ``report.compiled`` does.
    """

    for choice in itertools.product(grid.attention, grid.sharding, grid.remat):
        for rows in sorted(grid.rows):
            setting = Setting(*choice, rows)
            changed = configured(config, setting, len(devices))
            try:
                lowered = programs.lower_training(changed, devices, missing=missing)
                made, _ = compiled(lowered, chip, options)
                trial = Trial(setting, lowered.mesh, made, made.refusal)
            except UserError as error:
                trial = Trial(setting, tuple(changed.mesh), None, str(error))
            yield trial
            if not trial.fits:
                break  # more rows need more memory


def best(tried: Sequence[Trial]) -> Trial | None:
    """The fastest that fits, or None."""
    return min((trial for trial in tried if trial.fits), key=lambda t: t.order, default=None)


COLUMNS = (
    "attention  sharding   remat     rows   mesh           peak GiB  HBM     step ms  ms/image"
)


def line(trial: Trial) -> str:
    """A trial as a row of the table."""
    s, mesh = trial.setting, "x".join(map(str, trial.mesh))
    start = f"{s.attention:<10} {s.sharding:<10} {s.remat:<9} {s.rows:<6} {mesh:<14} "
    if trial.report is None or trial.report.memory is None:
        return start + "refused: " + " ".join(trial.refusal.split())[:200]
    values = trial.report.values()
    times = [values[k] for k in ("step_ms", "image_ms")]
    shown = "  ".join("not known" if t is None else f"{t:8.2f}" for t in times)
    tight = "" if trial.fits else "  too tight"
    return f"{start}{values['hbm_gb']:8.2f}  {values['hbm_share']:5.1%}  {shown}{tight}"


def lines_to_use(trial: Trial) -> list[str]:
    """The settings as flags of ``launch/train.py``, and for a config file."""
    s, batch = trial.setting, trial.report.lowered.batch
    return [
        "On the command line (a field that the config does not write needs the lines below):",
        f'  --config.batch={batch} --config.mesh="{trial.mesh}" --config.sharding={s.sharding} \\',
        f"  --config.system.denoiser.remat={s.remat} "
        f"--config.system.denoiser.attention={s.attention}",
        "In the config file:",
        f"  batch={batch}, mesh={trial.mesh}, sharding={s.sharding!r},",
        f'  config["system"]["denoiser"] |= {{"remat": {s.remat!r}, "attention": {s.attention!r}}}',
    ]


def values(trial: Trial) -> Values:
    """A trial as plain values."""
    # Of a refused setting there is only the refusal.
    found = trial.report.values() if trial.report is not None else {}
    keys = ("estimate_ms", "kernel_ms", "ici_ms", "step_ms", "image_ms", "hbm_gb", "hbm_share")
    facts = {k: found[k] for k in (*keys, "collective_gb", "compile_s") if k in found}
    refusal = {"refusal": " ".join(trial.refusal.split())[:300]} if trial.refusal else {}
    own = trial.setting._asdict() | {"mesh": list(trial.mesh), "fits": trial.fits}
    return own | facts | refusal
