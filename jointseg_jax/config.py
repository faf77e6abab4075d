"""What a run is made of, as types: every setting with its type, default, rule and meaning.

``RunConfig.parse(mapping)`` reads the nested mapping of a config file. Each setting is a field: it
has its default, its documentation is the comment behind it (``config_help`` shows both), and its
rules are checked when the object is made. Parts that are chosen by name (sources, codecs, solvers,
networks, optimizers) stay ``specs``, whose schema is the constructor that the name stands for.

``Problems`` collects texts, so that one walk can report everything that is wrong at once; with
``RAISE`` in its place the same walk stops at the first.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_type_hints

from jointseg_jax.specs import Spec, closest
from jointseg_jax.types import SEED_LIMIT, UserError

T = TypeVar("T")
PathRules = Sequence[tuple[Any, ...]]
"""``(regex, value)`` rules over tree paths, see ``rules``."""


# ------------------------------------------------------------------------------ problems


class Problems(list[str]):
    """Texts of what is wrong, each once."""

    def collect(self, make: Callable[[], T], where: str = "") -> T | None:
        """Returns what ``make`` returns, or None where it refuses; its text is collected then.

        Args:
          where: config path to put before a text that names none.
        """
        try:
            return make()
        except (UserError, ValueError) as error:
            for text in error.texts if isinstance(error, Refused) else [str(error)]:
                named = text.startswith("config.") or not where
                self.note(text if named else f"config.{where}: {text}")
        return None

    def note(self, text: str) -> None:
        """Collects a text once."""
        if text not in self:
            self.append(text)

    def block(self) -> str:
        """All texts as one, with their number where it is not one."""
        head = f"ERROR [config] {len(self)} problems:\n" if len(self) > 1 else ""
        return head + "\n".join(self)

    def raise_if_any(self) -> None:
        """Raises UserError with everything that was collected."""
        if self:
            raise UserError(self.block())


class _Raise(Problems):
    """Collects nothing: the first problem is raised."""

    def collect(self, make: Callable[[], T], where: str = "") -> T | None:
        return make()

    def note(self, text: str) -> None:
        raise UserError(text)


RAISE = _Raise()


class Refused(UserError):
    """A part of a config with wrong values; ``texts`` has a sentence for each."""

    def __init__(self, texts: Sequence[str]):
        super().__init__("\n".join(texts))
        self.texts = list(texts)


# ------------------------------------------------------------------------- parts of a run


class Range(NamedTuple):
    """Rule of a whole number: the least and the most that it may be."""

    least: int
    most: int | None = None

    def holds(self, value: object) -> bool:
        if type(value) is not int:  # a bool is no number here
            return False
        return self.least <= value and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, SEED_LIMIT)]


class Part:
    """A group of settings; subclasses say where it stands in the config and add rules."""

    PATH: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.PATH = path or cls.PATH

    def __post_init__(self) -> None:
        if texts := [*self._whole_numbers(), *self.errors()]:
            raise Refused(texts)

    def errors(self) -> Iterator[str]:
        """Yields a sentence for each rule that the values break, whole numbers apart."""
        yield from ()

    def _whole_numbers(self) -> Iterator[str]:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for rule in getattr(hint, "__metadata__", ()):
                value = getattr(self, name)
                if not rule.holds(value):
                    yield f"config.{self.PATH}{name} = {value!r}: must be a whole number, {rule}."


@dataclass(frozen=True, kw_only=True)
class ReadConfig(Part, path="data."):
    """How records are read; none of it changes what a batch holds."""

    workers: CountOrZero = 0  # reader processes; 0 reads in threads of this one
    threads: Count = 2  # in each of these processes
    prefetch: Count = 4  # batches that each of them keeps ready
    bad: str = "replace"  # a bad record by the next good one, or `stop`
    bad_limit: CountOrZero = 100  # different bad records before the run stops

    BAD: ClassVar[tuple[str, ...]] = ("replace", "stop")

    def errors(self) -> Iterator[str]:
        if self.bad not in self.BAD:
            yield f"config.data.bad = {self.bad!r}: one of: {', '.join(self.BAD)}."


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadConfig):
    """Where records come from and how batches are read."""

    train: Spec  # source of training
    val: Spec  # source of previews and evaluation
    cache: str = ""  # folder made by launch/encode.py, read instead of train (and val, if in it)
    transforms: Mapping[str, Spec] = field(default_factory=dict)  # paired, in this order
    panoptic: bool = False  # batches also have `panoptic`: label and instance number


class CodecPlace(NamedTuple):
    """A codec of a system: its spec, the batch field it codes, and its config path."""

    spec: Spec
    field: str
    where: str

    @property
    def trained(self) -> bool:
        """True if another run trained it: ``{"name": "trained", "workdir": ...}``."""
        return self.spec.get("name") == "trained"


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """What is trained: codecs, network, text, times and solver; ``name`` says how they combine."""

    name: str | None  # joint, bridge or autoencode
    size: Sequence[Any]  # (height, width) in pixels
    streams: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # joint: codec, process, ...
    image: Spec | None = None  # bridge: codec of images
    palette: Spec | None = None  # bridge, autoencode: colours of classes
    codec: Spec | None = None  # autoencode: the codec that is trained
    field: str = "labels"  # autoencode: the batch field it codes
    denoiser: Spec | None = None  # the network
    text: Spec | None = None  # text encoder; None where there is no text
    process: Spec | None = None  # bridge: the motion between the ends
    times: Spec | None = None  # how training times are drawn
    solver: Spec | None = None  # of sampling
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the system itself

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SystemConfig:
        """Reads ``config.system``; what is no field here is one of the system's constructor."""
        names = {f.name for f in dataclasses.fields(cls)} - {"options"}
        own = {k: v for k, v in values.items() if k in names}
        options = {k: v for k, v in values.items() if k not in names}
        # a missing name is refused where the system is built, with the names there are
        return cls(**{"name": None, "size": (), **own}, options=options)

    @property
    def given(self) -> dict[str, Any]:
        """All fields that are set, those of ``options`` among them, without the name."""
        own = {f.name: f.default for f in dataclasses.fields(self)}
        values = {k: getattr(self, k) for k in own if k not in ("name", "options")}
        return {k: v for k, v in values.items() if v not in (own[k], {})} | dict(self.options)

    def codecs(self) -> dict[str, CodecPlace]:
        """The codecs that make inputs into latents, by the name of their parameters."""
        where = "config.system.streams"
        places = {
            name: CodecPlace(stream["codec"], stream["field"], f"{where}.{name}.codec")
            for name, stream in self.streams.items()
            if "codec" in stream
        }
        if self.image is not None:
            places["image"] = CodecPlace(self.image, "image", "config.system.image")
        return places

    def trained_codecs(self) -> dict[str, CodecPlace]:
        """Those of ``codecs`` that other runs trained."""
        return {k: place for k, place in self.codecs().items() if place.trained}


@dataclass(frozen=True, kw_only=True)
class StartConfig(Part, path="start."):
    """Other weights to begin with, read before the first checkpoint only (``init_from``)."""

    workdir: str = ""  # a trained run, whose averaged parameters (and words) are taken
    file: str = ""  # or reference weights (.safetensors)
    architecture: Mapping[str, Any] | None = None  # of a file: the reference's own config
    move: PathRules = ((r"^", ""),)  # (regex, replacement): where each leaf goes; None drops it
    copy: PathRules = ()  # likewise over what was moved: a second place for what a rule matches
    init_map_stream: str = "random"  # two streams: the map stream's blocks begin so, or `copy`

    MAP_STREAM: ClassVar[tuple[str, ...]] = ("random", "copy")

    @property
    def is_fresh(self) -> bool:
        """True if no other weights are named."""
        return not (self.workdir or self.file)

    def errors(self) -> Iterator[str]:
        head, file = "config.start: start:", f"file={self.file!r}"
        if self.workdir and self.file:
            both = f"{head} workdir={self.workdir!r} and {file}"
            yield f"{both}: give one of the two, or neither for a fresh start."
        if self.file and self.architecture is None:
            needs = "a file needs the reference's own config of its network (embed_dim, depth, ...)"
            yield f"{head} {file} and architecture=None: {needs}."
        if self.init_map_stream not in self.MAP_STREAM:
            known = ", ".join(self.MAP_STREAM)
            yield f"{head} init_map_stream={self.init_map_stream!r}: one of {known}."


@dataclass(frozen=True, kw_only=True)
class LogConfig(Part, path="log."):
    """How often scalars are written."""

    every: Count = 50  # steps


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(Part, path="preview."):
    """Fixed samples drawn while the model trains."""

    every: CountOrZero = 1000  # steps; 0: never
    first: CountOrZero = 0  # step; from it on at its doubles until `every`; 0: at `every` first
    count: Count = 8  # pairs

    def early(self, steps: int) -> list[int]:
        """Lists the steps before ``every``, of a run of ``steps``, at which samples are drawn."""
        first, end = self.first, min(self.every, steps)
        doubles = (first << n for n in range(end.bit_length())) if first else ()
        return [step for step in doubles if step < end]

    def due(self, step: int, steps: int) -> bool:
        """Returns True where samples are drawn: early, at ``every`` step, after the last."""
        if not self.every:
            return False
        return step % self.every == 0 or step == steps or step in self.early(steps)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Part, path="checkpoint."):
    """How often the state is saved."""

    every: Count = 1000  # steps
    keep: Count = 3  # newest checkpoints; older ones are deleted


@dataclass(frozen=True, kw_only=True)
class NanConfig(Part, path="nan."):
    """What is done about losses that are not finite, or leap (``faults``)."""

    policy: str = "skip"  # the update, or `stop`, or `rollback` to the newest checkpoint
    limit: int = 10  # refused updates in a row, and returns to one checkpoint
    spike: float | int = 100.0  # a loss this many times the usual is a spike; 0: none is
    on_spike: str = "count"  # it, or `rollback` too

    POLICIES: ClassVar[tuple[str, ...]] = ("skip", "stop", "rollback")
    ON_SPIKE: ClassVar[tuple[str, ...]] = ("count", "rollback")

    def errors(self) -> Iterator[str]:
        known, spikes = ", ".join(self.POLICIES), ", ".join(self.ON_SPIKE)
        if self.policy not in self.POLICIES or self.limit < 0:
            policy = f"config.nan: policy {self.policy!r} must be one of {known}"
            yield f"{policy} and limit {self.limit} at least 0."
        if self.on_spike not in self.ON_SPIKE or not (self.spike == 0 or self.spike > 1):
            on_spike = f"config.nan: on_spike {self.on_spike!r} must be one of {spikes}"
            yield f"{on_spike} and spike {self.spike} above 1, or 0 (off)."


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig(Part, path="watchdog."):
    """When a run that stands still says so."""

    seconds: float | int = 1800  # without a step, before stacks are written; 0: off
    abort: bool = False  # also end the process then; the same command goes on

    def errors(self) -> Iterator[str]:
        if not self.seconds >= 0:  # NaN too
            yield f"config.watchdog: seconds = {self.seconds!r} must be 0 (off) or more."


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Part, path="profile."):
    """Which steps are traced for XProf, into WORKDIR/profile."""

    start: int = -1  # first traced step
    steps: CountOrZero = 0  # how many; 0: none


@dataclass(frozen=True, kw_only=True)
class FinishConfig(Part, path="finish."):
    """What is done after the last step."""

    num: CountOrZero = 0  # pairs generated and judged; 0: none


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Part, path="evaluate."):
    """How generated pairs are judged."""

    judge: str = ""  # `oracle` where the data knows its own labels; empty: none
    transforms: Mapping[str, Spec] = field(default_factory=dict)  # empty: those of training


@dataclass(frozen=True, kw_only=True)
class RunConfig(Part):
    """A training run: everything that ``launch/train.py --config`` gives."""

    steps: Count  # updates of the run
    batch: Count  # rows of an update, over all devices
    data: DataConfig
    system: SystemConfig
    optimizer: Spec  # adamw or muon, with its schedule
    seed: Seed = 0  # of everything random
    accumulate: Count = 1  # micro-batches per update
    ema: float | int = 0.9999  # decay of the averaged parameters; 0 keeps no average
    mesh: Sequence[Any] = (-1, 1, 1)  # data, fsdp, model; -1 takes the devices left over
    sharding: str | PathRules = "replicate"  # zero1, fsdp, fsdp+model or path rules
    trainable: PathRules = ((r"", True),)  # (path regex, bool): which parameters learn
    start: StartConfig = StartConfig()
    log: LogConfig = LogConfig()
    preview: PreviewConfig = PreviewConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    nan: NanConfig = NanConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()
    finish: FinishConfig = FinishConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)  # as given, to be stored

    def errors(self) -> Iterator[str]:
        if not 0 <= self.ema < 1:
            yield f"config.ema = {self.ema}: must lie in [0, 1); 0 keeps no average."

    @classmethod
    def parse(cls, values: Mapping[str, Any], problems: Problems | None = None) -> RunConfig:
        """Reads the nested mapping of a config file.

        Args:
          values: plain mapping, kept as ``values``: what a workdir stores and compares is what the
            user gave, so that a new setting's default does not make old runs look changed.
          problems: collects what is wrong, which then has defaults in its place. Without it, all
            that is wrong is raised as one UserError.

        Raises:
          UserError: a part is missing altogether, so that there is nothing to go on with.
        """
        if problems is None:
            config = cls.parse(values, problems := Problems())
            problems.raise_if_any()
            return config
        known = [f.name for f in dataclasses.fields(cls) if f.name != "values"]
        _refuse_unknown(values, known, "config", problems)
        if missing := sorted({"steps", "batch", "data", "system", "optimizer"} - set(values)):
            raise UserError(f"config.{', config.'.join(missing)}: missing.")
        given: dict[str, Any] = {k: v for k, v in values.items() if k in known}
        for name in PARTS.keys() & given.keys():
            given[name] = _part(name, given[name], problems)
        given["system"] = SystemConfig.parse(given["system"])
        return _made(cls, given | {"values": values}, problems)

    def replace(self, changes: Mapping[str, Any]) -> RunConfig:
        """The config with other values, by path (``"system.denoiser.remat"``)."""
        values = copy.deepcopy(dict(self.values))
        for path, value in changes.items():
            *way, last = path.split(".")
            node = values
            for name in way:
                node = node.setdefault(name, {})
            node[last] = value
        return RunConfig.parse(values)


PARTS: Mapping[str, type[Part]] = {
    name: kind
    for name, kind in get_type_hints(RunConfig).items()
    if isinstance(kind, type) and issubclass(kind, Part)
}
"""The groups of settings by their name in a config."""


def _part(name: str, values: Mapping[str, Any], problems: Problems) -> Part:
    part: Any = PARTS[name]
    where, fields = f"config.{name}", {f.name: f for f in dataclasses.fields(part)}
    _refuse_unknown(values, fields, where, problems)
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    required = {k for k, f in fields.items() if (f.default, f.default_factory) == unset}
    if missing := sorted(required - set(values)):
        raise UserError(f"{where}: needs {', '.join(missing)}.")
    return _made(part, {k: v for k, v in values.items() if k in fields}, problems)


HARMLESS: Mapping[str, Any] = {"steps": 10**9, "batch": 720_720 * 2**12}
"""For numbers that were refused: beyond any warm-up, and even shares for any devices."""


def _made(part: type[Any], values: Mapping[str, Any], problems: Problems) -> Any:
    """The part, with defaults for fields that were refused, so that the rest is checked too."""
    try:
        return part(**values)
    except Refused as error:
        for text in error.texts:
            problems.note(text)
        refused = {k for k in values for text in error.texts if re.search(rf"\b{k}\b", text)}
        kept = {k: v for k, v in values.items() if k not in refused}
        return part(**{**(HARMLESS if part is RunConfig else {}), **kept})


def _refuse_unknown(
    values: Mapping[str, Any], known: Collection[str], where: str, problems: Problems
) -> None:
    for name in sorted(set(values) - set(known)):
        problems.note(
            f"{where}: {where.rpartition('.')[2]} has no field {name!r}{closest(name, known)}; "
            f"its fields: {', '.join(known)}."
        )


# ------------------------------------------------------------------------------- JSON


def plain(config: Any) -> Any:
    """A config as JSON values: what is stored beside a checkpoint and compared on resume."""
    if isinstance(config, Mapping) or hasattr(config, "items"):
        return {k: plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain(v) for v in config]
    if isinstance(config, float) and math.isfinite(config) and config == int(config):
        return float(config)
    return config


def from_plain(values: Any) -> Any:
    """A config read back from JSON: sequences are tuples again, as in the files of configs."""
    if isinstance(values, Mapping):
        return {k: from_plain(v) for k, v in values.items()}
    return tuple(map(from_plain, values)) if isinstance(values, list) else values
