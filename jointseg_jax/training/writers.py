"""Where the figures of a run go: a line on the console, JSON lines, TensorBoard.

``metrics.jsonl`` is the record of truth (``jsonl``: a killed process leaves at most one torn line,
which is cut off when the file is opened again). A resumed run appends ``{"resumed": step}``:
records of later steps before that line no longer count, and ``read_records`` leaves them out.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import numpy as np

from jointseg_jax import jsonl

Scalars = Mapping[str, SupportsFloat]
"""Python, numpy or jax scalars by name; ``Writers`` hands on Python floats."""

Images = Mapping[str, np.ndarray]
"""uint8 [height, width, 1 or 3], checked in ``Writers.images``."""


class Writer:
    """One destination; each method may be called at any step, in any order, and does nothing."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Records numbers."""

    def note(self, step: int, line: str, scalars: Scalars) -> None:
        """Records numbers, of which a person reads ``line`` instead."""
        if scalars:
            self.write(step, scalars)

    def images(self, step: int, images: Images) -> None:
        """Records pictures."""

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        """Records texts by name."""

    def close(self) -> None:
        """Writes out what is pending."""


class Writers(Writer):
    """Several writers as one; silent on every process but the first."""

    def __init__(self, writers: Iterable[Writer]):
        # each writer opens its file when it first writes: the other processes leave no trace
        self._writers = list(writers) if jax.process_index() == 0 else []

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, scalars: Scalars) -> None:
        # one transfer for all of them, on every process: an array may lie on several hosts
        numbers = {name: float(value) for name, value in jax.device_get(dict(scalars)).items()}
        for writer in self._writers:
            writer.write(step, numbers)

    def note(self, step: int, line: str, scalars: Scalars) -> None:
        for writer in self._writers:
            writer.note(step, line, scalars)

    def images(self, step: int, images: Images) -> None:
        """Sends each picture to every writer."""
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
                raise ValueError(
                    f"writers: image {name!r} is {image.dtype}{list(image.shape)}; it must be "
                    "uint8 height x width x 1 or 3."
                )
        for writer in self._writers:
            writer.images(step, images)

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        for writer in self._writers:
            writer.text(step, texts)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


class ConsoleWriter(Writer):
    """One readable line per log point, without pictures; the same names give the same columns.

    Args:
      total: the last step, shown as ``step/total``.
      stream: where to print, standard output by default.
    """

    def __init__(self, total: int, stream: io.TextIOBase | None = None):
        self._total, self._stream = total, stream

    def write(self, step: int, scalars: Scalars) -> None:
        # losses first, then other numbers, then the rates
        last = {name: i for i, name in enumerate(_RATES, 1)}
        names = sorted(scalars, key=lambda n: (last.get(n, 0), not n.startswith("loss")))
        fields = [_field(name, float(scalars[name])) for name in names]
        self.note(step, " | ".join(fields), {})

    def note(self, step: int, line: str, scalars: Scalars) -> None:
        width = len(str(self._total))
        self._print(f"step {step:>{width}}/{self._total} | {line}")

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._print(f"{name}: {text}")

    def _print(self, line: str) -> None:
        # sys.stdout is looked up at each line: tests and notebooks replace it
        print(line, file=self._stream or sys.stdout, flush=True)


class JsonlWriter(Writer):
    """``{"step": n, "time": seconds, name: value, ...}``, one line per call; of pictures the sizes.

    Args:
      path: appended to; created at the first record.
      resumed: the step the run continues from, None if it starts.
    """

    def __init__(self, path: str | os.PathLike, *, resumed: int | None = None):
        self._path, self._resumed = Path(path), resumed

    @functools.cached_property
    def _file(self) -> io.FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        torn = jsonl.cut_torn_tail(self._path)
        file = self._path.open("ab", buffering=0)  # one system call per record
        if self._resumed is not None:
            cut = {"torn_bytes": torn} if torn else {}
            file.write(jsonl.line({"resumed": self._resumed, "time": time.time(), **cut}))
        return file

    def write(self, step: int, scalars: Scalars) -> None:
        if clash := {"step", "time", "resumed"} & set(scalars):
            taken = sorted(clash)
            raise ValueError(f"writers: {taken} cannot name scalars: every record has them.")
        self._append(step, {name: _json_number(float(v)) for name, v in scalars.items()})

    def images(self, step: int, images: Images) -> None:
        self._append(step, {"images": {name: list(image.shape) for name, image in images.items()}})

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        self._append(step, {"text": dict(texts)})

    def close(self) -> None:
        if "_file" in vars(self):  # asking for the property would open it
            self._file.close()

    def _append(self, step: int, record: Mapping[str, object]) -> None:
        line = {"step": step, "time": time.time(), **record}
        # the file stays standard JSON: NaN and infinities are strings by now, see _json_number
        self._file.write(jsonl.line(line, allow_nan=False))


class TensorBoardWriter(Writer):
    """Event files for TensorBoard (tensorboardX, no TensorFlow); texts are shown as Markdown.

    Args:
      folder: of the event files.
      resumed: the step the run continues from, None if it starts.
    """

    def __init__(self, folder: str | os.PathLike, *, resumed: int | None = None):
        self._folder, self._resumed = Path(folder), resumed

    @functools.cached_property
    def _events(self) -> Any:
        from tensorboardX import SummaryWriter  # its import takes long; only process 0 needs it

        # TensorBoard then hides what an earlier launch wrote from this step on
        purge = None if self._resumed is None else self._resumed + 1
        # the name of the file holds seconds only: without the suffix a quick restart, which gets
        # the same name, would truncate the earlier file
        suffix = f".{os.getpid()}.{self._resumed or 0}"
        return SummaryWriter(logdir=str(self._folder), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, float(value), step)
        self._events.flush()

    def images(self, step: int, images: Images) -> None:
        for name, image in images.items():
            self._events.add_image(name, image, step, dataformats="HWC")
        self._events.flush()

    def text(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._events.add_text(name, text, step)
        self._events.flush()

    def close(self) -> None:
        if "_events" in vars(self):
            self._events.close()


def run_writers(workdir: str | os.PathLike, *, total: int, step: int = 0) -> Writers:
    """Console, ``metrics.jsonl`` and ``tensorboard/`` of a run.

    Args:
      total: last step of the run.
      step: where this launch starts; above 0 the run is marked as resumed.
    """
    folder, resumed = Path(workdir), step or None
    lines = JsonlWriter(folder / "metrics.jsonl", resumed=resumed)
    return Writers(
        [ConsoleWriter(total), lines, TensorBoardWriter(folder / "tensorboard", resumed=resumed)]
    )


def append_scalars(workdir: str | os.PathLike, step: int, scalars: Scalars) -> None:
    """Adds numbers to ``metrics.jsonl`` and ``tensorboard/`` of a run that has ended at a step."""
    folder = Path(workdir)
    lines = JsonlWriter(folder / "metrics.jsonl")
    with Writers([lines, TensorBoardWriter(folder / "tensorboard", resumed=step)]) as writers:
        writers.write(step, scalars)


def read_records(path: str | os.PathLike) -> list[jsonl.Record]:
    """The records of a ``metrics.jsonl`` that count: none that a resumed run has replaced."""
    records: list[jsonl.Record] = []
    for record in jsonl.read(path):
        if "resumed" in record:
            records = [r for r in records if r["step"] <= record["resumed"]]
        else:
            records.append(record)
    return records


def _json_number(value: float) -> float | str:
    # json.dumps writes NaN, Infinity and -Infinity, which are no JSON: they become strings
    return value if math.isfinite(value) else json.dumps(value)


def _eta(seconds: float) -> str:
    return "ETA " + (jsonl.clock(seconds) if math.isfinite(seconds) else "?").rjust(7)


_RATES: dict[str, Callable[[float], str]] = {
    "images_per_second": lambda v: f"{v:>7.1f} img/s",
    "data_wait": lambda v: f"wait {100 * v:>4.1f} %",  # a fraction of the time
    "mfu": lambda v: f"MFU {100 * v:>4.1f} %",  # a fraction of the peak
    "eta_seconds": _eta,
}
"""How the console shows the scalars that it knows, at the end of a line; others as name value."""


def _field(name: str, value: float) -> str:
    if name in _RATES:
        return _RATES[name](value)
    plain = 1e-3 <= abs(value) < 1e5 or value == 0
    text = f"{value:.4g}" if plain else f"{value:.2e}"
    return f"{name} {text:>8}"
