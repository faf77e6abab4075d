"""Runs launchers one after another in one process, so that they import and compile once.

Each line of standard input is a JSON list: launcher, arguments, files for its standard output and
standard error. Its exit status is the answer, a line on standard output.
"""

import gc
import json
import os
import runpy
import sys
import traceback

from absl import flags


def serve() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    logs = os.dup(2)
    for line in sys.stdin:
        name, words, *files = json.loads(line)
        for number, file in enumerate(files, start=1):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, number)
            os.close(opened)
        status = run(name, words)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(logs, 1)
        os.dup2(logs, 2)
        print(status, file=answers)


def run(name: str, words: list[str]) -> int:
    """Runs ``launch/NAME.py`` with these words; returns its exit status."""
    script = f"launch/{name}.py"
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exited:
        if isinstance(exited.code, str):
            print(exited.code, file=sys.stderr)
            return 1
        return exited.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        _forget_flags(script)
        gc.collect()  # iterators of the data, while their flags can be read
    return 0


def _forget_flags(script: str) -> None:
    """Takes a launcher's flags away; those of a library are defined once, when it is imported."""
    ours = (script, "jointseg_jax", "ml_collections")
    by_module = flags.FLAGS.flags_by_module_dict().items()
    own = [flag.name for module, found in by_module if module.startswith(ours) for flag in found]
    overrides = [name for name in flags.FLAGS if "." in name]  # --config.PATH
    for name in {*own, *overrides} & set(flags.FLAGS):
        delattr(flags.FLAGS, name)


if __name__ == "__main__":
    serve()
