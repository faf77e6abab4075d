"""All that a run needs, looked at before it: config, data, mesh, memory, and its workdir.

Nothing is trained, and the workdir stays as it is (the compile cache grows by the program that was
compiled here). Every problem is collected; a part that another problem keeps from being looked at
says so.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from jointseg_jax import build, check, chips, sharding
from jointseg_jax.chips import Chip
from jointseg_jax.config import Problems, ReadConfig, RunConfig, SystemConfig
from jointseg_jax.data.audit import Report, scan
from jointseg_jax.data.cached.loader import CachedSource
from jointseg_jax.data.pipeline import batches
from jointseg_jax.data.records import BadSample, DatasetInfo, Source
from jointseg_jax.perf import programs, report
from jointseg_jax.training import init_from, pretrained, resume, snapshot
from jointseg_jax.training.checkpoints import Checkpoints, read_meta
from jointseg_jax.training.digest import describe
from jointseg_jax.training.step import check_batch
from jointseg_jax.training.workdir import copied_spec, load_codecs

T = TypeVar("T")
MAX_LISTED = 20  # bad records of a split


@dataclasses.dataclass
class Findings:
    """What validation saw, part by part: problems, and what is well."""

    problems: Problems = dataclasses.field(default_factory=Problems)
    rows: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def add(self, part: str, text: str) -> None:
        """Notes what is well."""
        self.rows.append((part, text))

    def attempt(self, make: Callable[[], T]) -> T | None:
        """Returns what ``make`` returns; None where it refuses, and its text is a problem then."""
        try:
            return self.problems.collect(make)
        except BadSample as error:
            self.problems.note(str(error))
        return None

    def note(self, *texts: str) -> None:
        """Collects problems, each once."""
        for text in texts:
            self.problems.note(text)

    def page(self) -> str:
        """The result as text."""
        width = max((len(part) for part, _ in self.rows), default=0)
        page = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
        page.subsequent_indent, lines = " " * (width + 4), []
        for part, text in self.rows:
            page.initial_indent = f"  {part:<{width}}  "
            lines.append(page.fill(text))
        if not self.problems:
            return "\n".join(["valid: this run can start; nothing was trained or written.", *lines])
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        head = f"ERROR [validate] {count}; nothing was trained or written."
        rest = ["What is well:", *lines] if lines else []
        return "\n".join([head, *self.problems, *rest])


def validate(
    values: Mapping[str, Any],
    workdir: str,
    *,
    topology: str | None = None,
    limit: int = 2000,
    allow: Sequence[str] = (),
) -> Findings:
    """Looks at everything that a run with this config needs.

    Args:
      values: the config as its file gives it.
      topology: of a TPU that need not exist (``v5e:4x4``); what is here when None.
      limit: of records of each split to read, spread evenly; 0 for all.
      allow: regexes of config paths that a resumed run may change.
    """
    findings = Findings()
    if topology is not None:
        jax.config.update("jax_platforms", "cpu")  # what a program is lowered on; nothing runs
    config, wrong = check.checked(values, workdir)
    findings.note(*wrong)
    if not wrong:
        findings.add("config", f"{config.steps:,} steps of {config.batch:,} rows")
    sources = {split: _data(config, split, limit, findings) for split in ("train", "val")}
    source, path = sources["train"], Path(workdir)
    saved = None if source is None else _checkpoint(config, path, source, allow, findings)
    devices = findings.attempt(
        lambda: present_devices() if topology is None else chips.devices_of(topology)
    )
    mesh = devices and findings.attempt(lambda: sharding.make_mesh(config.mesh, devices))
    divides = mesh and findings.attempt(lambda: check_batch(config, mesh) or True)
    if wrong or source is None or not divides:
        needed = "memory, which takes a config, data and a mesh that go together"
        findings.add("not looked at", needed)
        return findings
    info = DatasetInfo.of(source, captions=0)
    _batch(config, source, info, findings)
    _codecs(config, path, info, findings)
    state = _memory(config, path, devices, topology, findings)
    if state is not None:
        _arrays(saved, state, path, findings)
        _start(config, path, state, info, findings)
        _disk(config, path, state, findings)
    return findings


# --------------------------------------------------------------------------- data


def _data(config: RunConfig, split: str, limit: int, findings: Findings) -> Source | None:
    before = len(findings.problems)
    source = findings.attempt(lambda: build.source(config, split))
    if source is None or len(source) == 0:
        if len(findings.problems) == before:  # else the listing has said so
            findings.note(f"ERROR [data] config.data.{split}: there is not one record in it.")
        return None
    if isinstance(source, CachedSource):  # every row is read and compared with its sum
        damage = [str(problem) for problem in source.damage()]
        findings.note(*damage)
        if damage:
            return None
        findings.add(f"data.{split}", f"{len(source):,} encoded records read, none damaged")
        return source
    threads = max(config.data.threads, 1)
    looked = scan(source, threads=threads, limit=limit or None, spread=True)
    findings.note(*bad_records(looked, split, len(source)))
    if not looked.bad:
        findings.add(f"data.{split}", described(looked, len(source)))
    if looked.lost:
        findings.add(f"WARNING data.{split}", looked.lost)
    return source


def bad_records(looked: Report, split: str, total: int) -> list[str]:
    """A text per bad record, the first of them, and how many there are."""
    if not looked.bad:
        return []
    texts = [
        f"{problem} (record {index} of {total:,})" if index >= 0 else str(problem)
        for index, problem in looked.bad
    ]
    more = f"; the first {MAX_LISTED} are above" if len(texts) > MAX_LISTED else ""
    return [
        *texts[:MAX_LISTED],
        f"ERROR [data] config.data.{split}: {len(looked.bad)} bad among {looked.count:,} records "
        f"looked at{more}. Fix them, or write shards without them with launch/prepare.py.",
    ]


def described(looked: Report, total: int) -> str:
    """What a scan saw, in a sentence."""
    count, fewest, _, most = looked.captions
    sizes = ", ".join(f"{w}x{h} ({n:,})" for (h, w), n in looked.sizes[:3])
    more = f" and {len(looked.sizes) - 3} more" if len(looked.sizes) > 3 else ""
    parts = [
        f"{looked.count:,} of {total:,} records read, all good",
        f"{len(looked.names)} classes",
        f"sizes (width x height) {sizes}{more}",
        f"{count:,} captions of {fewest} to {most} words",
        f"void {100 * looked.void_share:.1f} % of pixels",
    ]
    odd = {"never seen": ", ".join(looked.unseen), "void all over": len(looked.empty)}
    odd["groups of equal images"] = len(looked.duplicates)
    return "; ".join([*parts, *(f"{what}: {seen}" for what, seen in odd.items() if seen)]) + "."


def _batch(config: RunConfig, source: Source, info: DatasetInfo, findings: Findings) -> None:
    """One small batch, made as training makes it."""
    tokenizer = build.tokenizer(config.system, info.vocabulary)

    def make() -> dict[str, np.ndarray]:
        with batches(
            source,
            ReadConfig(threads=1, prefetch=1),
            batch=2,
            seed=config.seed,
            transforms=build.transforms(config.data),
            tokenizer=tokenizer.encode if tokenizer else None,
            instances=build.instances(config),
        ) as made:
            return next(made)

    rows = findings.attempt(make)
    if rows is not None:
        shapes = {k: f"{v.dtype}{list(v.shape[1:])}" for k, v in rows.items()}
        fields = ", ".join(f"{k} {shape}" for k, shape in shapes.items() if k != "index")
        findings.add("batch", f"each row has {fields}")


# ---------------------------------------------------------------- devices, memory


def present_devices() -> list[Any]:
    """The devices that a run would take."""
    return jax.devices()


def present_chip() -> Chip:
    """A device of this machine; of a CPU, its part of the memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    size = stats.get("bytes_limit")
    if size is None:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    any_other = next(iter(chips.CHIPS.values()))  # only memory is asked for
    return dataclasses.replace(any_other, hbm=size / report.GIB)


def _memory(
    config: RunConfig, workdir: Path, devices: list[Any], topology: str | None, findings: Findings
) -> Any:
    """Compiles the update; returns the shapes of the state."""
    missing = programs.Missing(codec=_gathered(config, workdir))
    lowered = findings.attempt(lambda: programs.lower_training(config, devices, missing=missing))
    if lowered is None:
        return None
    chip = chips.chip_of(topology) if topology else present_chip()
    made = findings.attempt(lambda: report.compiled(lowered, chip)[0])
    if made is not None:
        _fits(made, topology or f"{len(devices)} x {devices[0].device_kind}", findings)
    shapes = lowered.program.args_info[0][0]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def _fits(made: report.Report, where: str, findings: Findings) -> None:
    data, fsdp, model = made.lowered.mesh
    rows = made.lowered.batch / (data * fsdp)
    mesh = f"data {data} x fsdp {fsdp} x model {model} on {where}"
    findings.add("mesh", f"{mesh}; {rows:g} rows per data shard")
    memory, limit = made.memory, made.chip.hbm
    remedy = (
        "Take fewer rows (config.batch), give config.system.denoiser.remat='full', or split the "
        "state (config.sharding zero1 or fsdp, config.mesh)."
    )
    if memory is None:
        findings.note(f"config.batch: does not fit. {remedy} The compiler says:\n{made.refusal}")
    elif memory.peak > limit:
        takes = f"the update takes {_size(memory.peak)} on each device, which has {_size(limit)}"
        findings.note(f"config.batch: {takes}. {remedy}")
    else:
        share = memory.peak / limit
        tight = ", tight" if share > report.TIGHT else ""
        findings.add(
            "memory",
            f"{_size(memory.peak)} of {_size(limit)} per device ({share:.1%}{tight}), "
            f"by the compiler's plan: state and batch {_size(memory.arguments)}, activations and "
            f"gradients {_size(memory.temporaries)}; compiled in {made.seconds:.1f} s",
        )


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{1024 * gib:.1f} MiB"


# ------------------------------------------------------------------------ workdir


def _gathered(config: RunConfig, workdir: Path) -> SystemConfig | None:
    """What would train the codec that the workdir has a copy of."""
    for name, place in config.system.trained_codecs().items():
        spec = copied_spec(workdir, name)
        if spec is not None:
            return SystemConfig(name="autoencode", size=(), codec=spec, field=place.field)
    return None


def _codecs(config: RunConfig, workdir: Path, info: DatasetInfo, findings: Findings) -> None:
    cache = config.data.cache
    for name, place in config.system.trained_codecs().items():
        if cache and copied_spec(workdir, name) is None:
            if findings.attempt(lambda: load_codecs(Path(cache), config.system)):
                findings.add(f"codec {name}", f"that of {cache}")
        elif copied_spec(workdir, name) is None:
            if findings.attempt(lambda place=place: pretrained.load_codec(place, info)):
                findings.add(f"codec {name}", f"that of {place.spec['workdir']}")
        elif findings.attempt(lambda: load_codecs(workdir, config.system)):
            findings.add(f"codec {name}", f"the copy in {workdir / 'frozen'}")


def _checkpoint(
    config: RunConfig, workdir: Path, source: Source, allow: Sequence[str], findings: Findings
) -> dict[str, Any] | None:
    """The meta of the newest checkpoint, whose settings and classes must be this config's."""
    if (workdir / "facts.json").exists():
        known = DatasetInfo.of(source, captions=0)
        findings.attempt(lambda: resume.require_info(known, workdir / "facts.json"))
    folder = workdir / "checkpoints"
    steps = Checkpoints(folder, read_only=True).steps() if folder.is_dir() else []
    if not steps:
        findings.add("checkpoint", f"none in {workdir}: the run starts at step 0")
        return None
    meta = findings.attempt(lambda: read_meta(folder))
    if meta is None:
        return None
    current, before = resume.settings(config, source), len(findings.problems)
    findings.attempt(lambda: resume.require_settings(meta, current, allow, workdir))
    if len(findings.problems) == before:
        left = max(config.steps - meta["step"], 0)
        where = f"the run goes on from step {meta['step']:,} in {workdir}"
        findings.add("checkpoint", f"{where}; {left:,} steps are left")
    return meta


def _arrays(saved: dict[str, Any] | None, state: Any, workdir: Path, findings: Findings) -> None:
    """Compares the arrays of the newest checkpoint with those of this model, unread."""
    if saved is None:
        return
    kinds = {path: kind for path, (kind, _) in saved["checkpoint"]["leaves"].items()}
    wanted = {path: describe(leaf) for path, leaf in snapshot.leaves(state).items()}
    where = str(workdir / "checkpoints" / str(saved["step"]))
    if findings.attempt(lambda: snapshot.require_fit(kinds, wanted, where) or True):
        findings.add("arrays", f"the checkpoint's {len(kinds):,} fit, by name, shape and dtype")


def _start(
    config: RunConfig, workdir: Path, state: Any, info: DatasetInfo, findings: Findings
) -> None:
    start = config.start
    if start.is_fresh or check.has_checkpoint(str(workdir)):
        return
    given = findings.attempt(lambda: init_from.load(start, state.params, info))
    if given is not None:
        findings.add("start", f"{len(given):,} arrays from {start.workdir or start.file}")


def _disk(config: RunConfig, workdir: Path, state: Any, findings: Findings) -> None:
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    keep = config.checkpoint.keep + 1  # the new one is written before the oldest goes
    above = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    free = shutil.disk_usage(above).free
    each = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    text = f"{keep - 1} checkpoints of {each} are kept; {free / 1e9:.1f} GB are free"
    if keep * size > free:
        remedy = f"Free some, or lower config.checkpoint.keep = {keep - 1}."
        findings.note(f"--workdir={workdir}: {text}. {remedy}")
    else:
        findings.add("disk", text)
