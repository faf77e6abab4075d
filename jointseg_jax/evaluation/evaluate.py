"""What a trained workdir is worth, in numbers: one report, by the type of its system.

A codec run: what it decodes compared with what it encoded, over the validation split
(``codec_report.py``). A joint run: its annotation codec, then pairs generated from validation
captions (``pair_report.py``). A bridge: both directions (``bridge_report.py``).

Of several processes each generates its share of the pairs; all measure the same, the first writes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jointseg_jax.codecs.label_ae import LabelAE
from jointseg_jax.evaluation.bridge_report import bridge_report
from jointseg_jax.evaluation.codec_report import autoencoder_report
from jointseg_jax.evaluation.pair_report import joint_report
from jointseg_jax.generation.sample import check_seed
from jointseg_jax.systems.autoencode import Autoencode
from jointseg_jax.systems.bridge import Bridge
from jointseg_jax.systems.joint import Joint
from jointseg_jax.training.workdir import load_run
from jointseg_jax.types import UserError

REPORTS = {Joint: joint_report, Autoencode: autoencoder_report, Bridge: bridge_report}
"""(run, num, seed, steps) -> report, by the type of the run's system."""


def evaluate(
    workdir: Path,
    num: int = 256,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    steps: Sequence[int] = (),
    refine: int | None = None,
) -> dict[str, Any]:
    """Measures a workdir, writes ``WORKDIR/evaluation.json`` and returns it.

    Args:
      num: pairs to generate; a codec run has none.
      seed: of the pairs' noise and of the shuffle for chance.
      size: (height, width) to which a codec run's validation maps are resized and cropped,
        instead of the config's.
      steps: numbers of solver steps to compare; the config's alone when there are none.
      refine: refinement steps of a label autoencoder run, instead of its config's.
    """
    check_seed(seed)
    workdir = Path(workdir)
    run = load_run(workdir)
    report: dict[str, Any] = {"step": run.step, "checkpoint_digest": run.digest}
    if size is not None:
        resize = {"name": "resize", "size": size, "mode": "crop"}
        config = run.config.replace({"evaluate.transforms": {"resize": resize}})
        run = dataclasses.replace(run, config=config)
        report["size"] = list(size)
    if refine is not None:
        codec = getattr(run.system, "codec", None)
        if not isinstance(codec, LabelAE):
            raise UserError(f"{workdir}: --refine is for runs of a label_ae codec; leave it out.")
        codec = dataclasses.replace(codec, refine=refine)
        run = dataclasses.replace(run, system=dataclasses.replace(run.system, codec=codec))
        report["refine"] = refine
    # By type, not by the name in the config: a system that a notebook composes has none.
    report |= REPORTS[type(run.system)](run, num, seed, steps)
    # All processes measured the same pairs; only one may write the file.
    if jax.process_index() == 0:
        (workdir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report by their names in a run's curves, all below ``evaluation/``."""
    rows = report.get("table", [])
    report = {**report, **rows[0]} if len(rows) == 1 else report
    groups = {"": report} | {f"{k}/": v for k, v in report.items() if k.startswith("scenes")}
    return {
        f"evaluation/{prefix}{name}": float(value)
        for prefix, group in groups.items()
        for name, value in group.items()
        if isinstance(value, (int, float)) and name not in ("step", "steps")
    }
