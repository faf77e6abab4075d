"""What every launcher does around its library call: flags, errors, logging, exit status.

A user's mistake (``UserError``, a bad flag, an unknown config override) is one block of text and
exit status 2; a bug keeps its traceback. absl and ml_collections stop at the first mistake of a
command line; here every ``--config.PATH=VALUE`` is looked at by itself, against the config it would
change. Of several processes the first alone prints results, and one that cannot go on without
another says so and exits with ``distributed.PEER_LOST``.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import app, flags

from jointseg_jax import distributed
from jointseg_jax.data.records import BadSample
from jointseg_jax.types import SEED_LIMIT, UserError

USAGE_ERROR = 2

MISREAD = (AttributeError, LookupError, OSError, TypeError, ValueError, flags.Error, UserError)
"""What absl and ml_collections raise about a command line."""

KINDS: dict[type, tuple[flags.ArgumentParser, str]] = {
    bool: (flags.BooleanParser(), "true or false"),
    int: (flags.IntegerParser(), "a whole number (int), written in digits"),
    float: (flags.FloatParser(), "a number (float)"),
}
"""How a field of this type is read from text, and what to say where it cannot be."""

# ------------------------------------------------------------------- the command line


def run(main: Callable[[], int | None], check: Callable[[], list[str]] = list) -> None:
    """Parses flags, calls ``main`` and exits with its status.

    Args:
      check: further mistakes, to be told with those of the command line where it has any.
    """
    app.run(lambda argv: _guarded(main), flags_parser=functools.partial(_parse, check=check))


def _parse(argv: Sequence[str], check: Callable[[], list[str]]) -> list[str]:
    argv = _with_values(argv)
    try:
        rest = flags.FLAGS(argv)
        _require_files()
        found = _stray(rest)
    except MISREAD as error:
        found = _misread(argv) or [f"ERROR [flags] {_text(error)}"]
    if found:
        with contextlib.suppress(flags.Error, OSError):  # there are no values, or no config
            found += check()
        _refuse("\n".join([*found, "See --help."]))
    return rest


def _require_files() -> None:
    """Has a config file that is not there raise now: ml_collections waits until it is used."""
    for name in flags.FLAGS:
        hasattr(flags.FLAGS[name].value, "to_dict")


def _stray(words: Sequence[str]) -> list[str]:
    """What to say of words that are no flags."""
    plain = [word for word in words[1:] if not word.startswith("-")]
    found = []
    for name in (word.lstrip("-").partition("=")[0] for word in words[1:] if word not in plain):
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
    plain, given = split_overrides(argv)
    try:
        rest = _read(plain)
        _require_files()
        names = {override.flag for override in given} & set(flags.FLAGS)
        configs = {name: flags.FLAGS[name].value for name in names}
        wrong = {override: mistake(override, configs) for override in given}
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


class Override(NamedTuple):
    """``--FLAG.PATH=VALUE``; ``value`` is None for a bare switch."""

    flag: str
    path: str
    value: str | None
    words: tuple[str, ...]


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The words of a command line without its overrides, and the overrides."""
    plain, found, words = [], [], list(argv)
    while words:
        given = (words.pop(0),)
        match = re.fullmatch(r"--?(?:no)?(\w+)\.([^=]+)(?:=(.*))?", given[0], re.DOTALL)
        if match is None:
            plain += given
            continue
        flag, path, value = match.groups()
        if value is None and words and not words[0].startswith("-"):
            value = words.pop(0)
            given += (value,)
        found.append(Override(flag, path, value, given))
    return plain, found


def mistake(override: Override, configs: Mapping[str, Any]) -> str | None:
    """What is wrong with an override, or None.

    Args:
      configs: nested mappings by the name of their flag.
    """
    flag, path, text, words = override
    if flag not in configs:
        return f"{words[0]}: there is no flag --{flag} with fields."
    node, where, given = configs[flag], flag, f"--{flag}.{path}"
    for name in (name.partition("[")[0] for name in path.split(".")):
        if not hasattr(node, "items"):
            return f"{given}: {where} is {node!r} ({type(node).__name__}) and has no fields."
        names = list(node)
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f" (did you mean {' or '.join(f'{where}.{c}' for c in close)}?)" if close else ""
            fields = ", ".join(names)
            return f"{given}: {where} has no field {name!r}{hint}; its fields: {fields}."
        node, where = node[name], f"{where}.{name}"
    if type(node) not in KINDS or text is None:
        return None
    parser, wanted = KINDS[type(node)]
    try:
        parser.parse(text)
    except (ValueError, TypeError):
        return f"{given}={text}: {text!r} is not {wanted}{_example(text, node)}."
    return None


def _example(text: str, value: bool | int | float) -> str:
    """``, as 10000`` for the text 1e4 where an int is wanted; else the value of now."""
    if isinstance(value, bool):
        return ""
    with contextlib.suppress(ValueError, OverflowError):
        if float(text) == int(float(text)):
            return f", as {int(float(text))}"
    return f", as {value}"


# ------------------------------------------------------------------ errors, log, result


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


# ------------------------------------------------------------------- flags, processes

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
    where = "HOST:PORT of process 0; on SLURM, TPU pods and GKE it is found."
    flags.DEFINE_string("coordinator", None, where)
    flags.DEFINE_integer("num_processes", None, "How many processes this run has.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    dead = "After so long without a sign of life a process counts as dead, and the others end."
    flags.DEFINE_integer("heartbeat_seconds", distributed.HEARTBEAT, dead, lower_bound=2)


def define_seed_flag(values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder[int]:
    """Defines ``--seed``: 32 bits, for two seeds are never one."""
    bounds = {"lower_bound": 0, "upper_bound": SEED_LIMIT}
    return flags.DEFINE_integer("seed", 0, "Seed of the noise.", flag_values=values, **bounds)


def start(*, saves: bool = False) -> None:
    """Joins the other processes of the run, if there are any, and opens the compile cache.

    Args:
      saves: whether SIGTERM is answered by saving; else it ends the process.
    """
    names = ("coordinator", "num_processes", "process_id")
    given = distributed.Flags(**{name: flags.FLAGS[name].value for name in names})
    distributed.initialise(given, heartbeat=flags.FLAGS.heartbeat_seconds)
    if not saves:  # jax's service catches it, and would only note it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    use_compile_cache()


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in ``$JAX_COMPILATION_CACHE_DIR`` or ``~/.cache``."""
    import jax

    default = os.path.join(os.path.expanduser("~"), ".cache", "jointseg_jax", "xla")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", default)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
