"""What every launcher does around its library call: flags, errors, logging, exit status.

A user's mistake (``UserError``, a bad flag, an unknown config override) is one block of text and
exit status 2; a bug keeps its traceback. Of several processes the first alone prints results, and
one that cannot go on without another says so and exits with ``distributed.PEER_LOST``.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from jointseg_jax import distributed, overrides
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

USAGE_ERROR = 2


MISREAD = (AttributeError, LookupError, OSError, TypeError, ValueError, flags.Error, UserError)
"""What absl and ml_collections raise about a command line."""


def run(main: Callable[[], int | None], check: Callable[[], list[str]] | None = None) -> None:
    """Parses flags, calls ``main`` and exits with its status.

    Args:
      check: further mistakes, to be told with those of the command line where it has any.
    """
    parse = functools.partial(_parse, check=check or (lambda: []))
    app.run(lambda argv: _guarded(main), flags_parser=parse)


def _parse(argv: Sequence[str], check: Callable[[], list[str]]) -> list[str]:
    argv = _with_values(argv)
    try:
        rest = flags.FLAGS(argv)
        _require_files()
        found = _stray(rest)
    except MISREAD as error:
        found = _misread(argv) or [f"ERROR [flags] {_text(error)}"]
    if found:
        _refuse("\n".join([*found, *_rest(check), "See --help."]))
    return rest


def _require_files() -> None:
    """Has a config file that is not there raise now: ml_collections waits until it is used."""
    for name in flags.FLAGS:
        hasattr(flags.FLAGS[name].value, "to_dict")


def _stray(words: Sequence[str]) -> list[str]:
    """What to say of words that are no flags."""
    unknown = [word.lstrip("-").partition("=")[0] for word in words[1:] if word.startswith("-")]
    plain = [word for word in words[1:] if not word.startswith("-")]
    found = []
    for name in unknown:
        close = difflib.get_close_matches(name, list(flags.FLAGS), n=1)
        hint = f"; did you mean --{close[0]}?" if close else "."
        found.append(f"ERROR [flags] there is no flag --{name}{hint}")
    if plain:
        hints = " ".join("--" + word if "=" in word else word for word in plain)
        found.append(
            f"ERROR [flags] not understood: {' '.join(plain)}. "
            f"Overrides start with two dashes: {hints}."
        )
    return found


def _misread(argv: Sequence[str]) -> list[str]:
    """All mistakes of a command line whose overrides cannot be read; leaves the good ones read."""
    plain, given = overrides.split(argv)
    try:
        rest = _read(plain)
        _require_files()
        names = {override.flag for override in given} & set(flags.FLAGS)
        configs = {name: flags.FLAGS[name].value for name in names}
        wrong = {override: overrides.mistake(override, configs) for override in given}
        _read([*plain, *(word for o in given if wrong[o] is None for word in o.words)])
    except MISREAD as error:
        return [f"ERROR [flags] {_text(error)}"]
    return [f"ERROR [flags] {text}" for text in wrong.values() if text] + _stray(rest)


def _text(error: BaseException) -> str:
    """An error's words; of a mistake that a config file found in its argument, these alone."""
    text = str(error).strip()
    absent = re.search(r"No such file or directory: '(.*)'", text)
    if isinstance(error, OSError) and absent:
        return f"--config={absent.group(1)}: there is no such file."
    head, _, said = text.rpartition("\nValueError: ")
    return f"{head.partition(': ')[0]}: {said}" if said and "Traceback" in head else text


def _read(argv: Sequence[str]) -> list[str]:
    sys.argv = list(argv)  # where ml_collections looks for overrides
    for name in [name for name in flags.FLAGS if "." in name]:  # of an earlier reading
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    return flags.FLAGS(sys.argv, known_only=True)


def _rest(check: Callable[[], list[str]]) -> list[str]:
    """What ``check`` finds, where the flags have been read far enough for it."""
    try:
        return check()
    except (flags.Error, OSError):  # there are no values, or no config
        return []


def _guarded(main: Callable[[], int | None]) -> None:
    _log_to_stderr()
    try:
        status = main()
    except (UserError, BadSample) as error:
        _refuse(str(error))
    except Exception as error:
        if not distributed.several():
            raise
        _failed(error)
    distributed.detach()
    sys.exit(status or 0)


def _refuse(text: str) -> None:
    if distributed.first_to_report(text):
        print(text, file=sys.stderr)
    distributed.leave(USAGE_ERROR)
    sys.exit(USAGE_ERROR)


def _failed(error: Exception) -> None:
    """Ends one process of several on a bug, or because another is gone."""
    if not distributed.lost_peer(error):
        traceback.print_exc()
        distributed.leave(1)
    print(
        f"ERROR [processes] lost another process of this run ({str(error).splitlines()[0]:.160}): "
        "its own last lines say why. Run the same command again on all hosts: it goes on from the "
        "newest checkpoint.",
        file=sys.stderr,
    )
    distributed.leave(distributed.PEER_LOST)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jointseg_jax")
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [handler]
    logger.propagate = False
    # that there is no TPU is no news where there is none
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)


def last_line(values: dict[str, Any]) -> None:
    """Prints one JSON object as the last line of standard output, on the first process."""
    if distributed.is_first():
        sys.stdout.flush()
        print(json.dumps(values), flush=True)


OPTIONAL: set[str] = set()
"""Flags that may stand without a value, which then is the empty text."""


def define_optional(name: str, text: str) -> flags.FlagHolder[str | None]:
    """Defines a flag whose value may be left out: None without the flag, "" for the bare flag."""
    OPTIONAL.add(name)
    return flags.DEFINE_string(name, None, text)


def _with_values(argv: Sequence[str]) -> list[str]:
    """The words of a command line, each bare optional flag with its empty value."""
    after = [*argv[1:], "--"]
    bare = {f"--{name}" for name in OPTIONAL}
    return [
        f"{word}=" if word in bare and following.startswith("-") else word
        for word, following in zip(argv, after)
    ]


def define_process_flags() -> None:
    """Defines the flags of a launcher that may run as several processes; see ``start``."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; on SLURM, TPU pods and GKE it is found."
    )
    flags.DEFINE_integer("num_processes", None, "How many processes this run has.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        distributed.HEARTBEAT,
        "After so long without a sign of life a process counts as dead, and the others end.",
        lower_bound=2,
    )


def start(*, saves: bool = False) -> None:
    """Joins the other processes of the run, if there are any, and opens the compile cache.

    Args:
      saves: whether SIGTERM is answered by saving; else it ends the process.
    """
    values = flags.FLAGS
    given = distributed.Flags(
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
    )
    distributed.initialise(given, heartbeat=values.heartbeat_seconds)
    if not saves:  # jax's service catches it, and would only note it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    use_compile_cache()


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in ``$JAX_COMPILATION_CACHE_DIR`` or ``~/.cache``."""
    import jax

    default = os.path.join(os.path.expanduser("~"), ".cache", "jointseg_jax", "xla")
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", default)
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
