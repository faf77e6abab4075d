"""What every launcher does around its library call: flags, errors, logging, exit status.

A user's mistake (``UserError``, a bad flag, an unknown config override) is one block of text and
exit status 2; a bug keeps its traceback. Of several processes the first alone prints results, and
one that cannot go on without another says so and exits with ``peers.PEER_LOST``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from jointseg_jax import peers, processes
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
    except Exception as error:
        if not peers.several():
            raise
        _failed(error)
    peers.take_leave()
    sys.exit(status or 0)


def _refuse(text: str) -> None:
    if peers.is_first_to_say(text):
        print(text, file=sys.stderr)
    peers.leave(USAGE_ERROR)
    sys.exit(USAGE_ERROR)


def _failed(error: Exception) -> None:
    """Ends one process of several on a bug, or because another is gone."""
    if not peers.lost_peer(error):
        traceback.print_exc()
        peers.leave(1)
    print(
        f"ERROR [processes] lost another process of this run ({str(error).splitlines()[0]:.160}): "
        "its own last lines say why. Run the same command again on all hosts: it goes on from the "
        "newest checkpoint.",
        file=sys.stderr,
    )
    peers.leave(peers.PEER_LOST)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("jointseg_jax")
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [handler]
    logger.propagate = False


def last_line(values: dict[str, Any]) -> None:
    """Prints one JSON object as the last line of standard output, on the first process."""
    if peers.is_first():
        sys.stdout.flush()
        print(json.dumps(values), flush=True)


def define_process_flags() -> None:
    """Defines the flags of a launcher that may run as several processes; see ``start``."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0; on SLURM, TPU pods and GKE it is found."
    )
    flags.DEFINE_integer("num_processes", None, "How many processes this run has.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        processes.HEARTBEAT,
        "After so long without a sign of life a process counts as dead, and the others end.",
        lower_bound=2,
    )


def start(*, saves: bool = False) -> None:
    """Joins the other processes of the run, if there are any, and opens the compile cache.

    Args:
      saves: whether SIGTERM is answered by saving; else it ends the process.
    """
    values = flags.FLAGS
    given = processes.Flags(
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
    )
    processes.initialise(given, heartbeat=values.heartbeat_seconds)
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
