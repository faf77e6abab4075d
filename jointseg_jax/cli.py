"""What every launcher does around its library call: flags, errors, logging, exit status.

A user's mistake (``UserError``, a bad flag, an unknown config override) is one block of text and
exit status 2; a bug keeps its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from jointseg_jax.data.records import BadSample
from jointseg_jax.types import UserError

USAGE_ERROR = 2


def run(main: Callable[[], int | None]) -> None:
    """Parses flags, calls ``main`` and exits with its status."""
    app.run(lambda argv: _guarded(main), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
    except (AttributeError, KeyError) as error:
        _refuse(f"ERROR [flags] --config.*: no such field in this config: {error}\nSee --help.")
    except (TypeError, ValueError, flags.Error, UserError) as error:
        _refuse(f"ERROR [flags] {error}\nSee --help.")
    if len(rest) > 1:
        hints = " ".join("--" + word if "=" in word else word for word in rest[1:])
        _refuse(
            f"ERROR [flags] not understood: {' '.join(rest[1:])}. "
            f"Overrides start with two dashes: {hints}. See --help."
        )
    return rest


def _guarded(main: Callable[[], int | None]) -> None:
    _log_to_stderr()
    try:
        status = main()
    except (UserError, BadSample) as error:
        _refuse(str(error))
    sys.exit(status or 0)


def _refuse(text: str) -> None:
    print(text, file=sys.stderr)
    sys.exit(USAGE_ERROR)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jointseg_jax")
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [handler]
    logger.propagate = False


def last_line(values: dict[str, Any]) -> None:
    """Prints one JSON object as the last line of standard output."""
    sys.stdout.flush()
    print(json.dumps(values), flush=True)


def use_compile_cache() -> None:
    """Keeps compiled programs between runs, in ``$JAX_COMPILATION_CACHE_DIR`` or ``~/.cache``."""
    import jax

    default = os.path.join(os.path.expanduser("~"), ".cache", "jointseg_jax", "xla")
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", default)
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
