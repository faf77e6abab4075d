"""What to run after training: commands that follow from what the trained system can do."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

from jointseg_jax import build
from jointseg_jax.config import RunConfig
from jointseg_jax.generation.sampler import with_options
from jointseg_jax.systems.system import Generator
from jointseg_jax.types import UserError

GIVEN = {
    "image": ("images", "label your own pictures: put them there"),
    "labels": ("annotations", "make pictures for your own label maps: put them there"),
}
"""Batch field that a system may start from -> kind of ``--given``, and what it is good for."""


class Command(NamedTuple):
    """A line for a shell in the repository root."""

    purpose: str
    words: tuple[str, ...]
    """The launcher and its flags."""

    def __str__(self) -> str:
        return f"# {self.purpose}\n{shlex.join(('python', *self.words))}"


def next_commands(
    config: RunConfig, system: Any, workdir: Path, examples: Path, own_data: str
) -> list[Command]:
    """Returns what to run with a trained workdir: sample, measure, train on one's own data.

    Args:
      system: Joint, Bridge, Autoencode or the like, of that config.
      examples: the folder of ``write_examples``, so that each command runs as it stands.
      own_data: a config, with its arguments, that reads data in folders.
    """
    pairs = _makes_pairs(system)
    sampled = _sample(config, system, workdir, examples) if pairs else None
    measured = _evaluate(system, workdir) if pairs or not isinstance(system, Generator) else None
    roots = [f"--config.data.{split}.root={examples}" for split in ("train", "val")]
    own = Command(
        "train on your own folder, laid out like this one (with --validate: check it first)",
        ("launch/train.py", "--config", own_data, "--workdir", f"{workdir}-own", *roots),
    )
    return [command for command in (sampled, measured, own) if command is not None]


def _makes_pairs(system: Any) -> bool:
    """Returns True if ``sample`` can write what the system makes."""
    try:
        with_options(system, steps=None, guidance=None)
    except UserError:
        return False
    return True


def _sample(config: RunConfig, system: Generator, workdir: Path, examples: Path) -> Command | None:
    """Sampling from a person's own prompts, pictures or maps; None where it takes other files."""
    words = ("launch/sample.py", "--workdir", str(workdir), "--out", str(workdir / "mine"))
    prompts = ()
    if system.text is not None:
        if not build.reads_words(config.system):  # features that no launcher here can make
            return None
        prompts = ("--prompts", str(examples / "prompts.txt"))
    known = starts(system)
    if not known:  # it starts from what no launcher reads
        return None
    if known[0] is None:
        purpose = "pairs from your own prompts: edit that file" if prompts else "more pairs"
        return Command(purpose, (*words, *prompts, "--num", "16"))
    kind, purpose = GIVEN[known[0]]
    return Command(purpose, (*words, "--given", f"{kind}={examples / kind / 'val'}", *prompts))


def starts(system: Generator) -> list[str | None]:
    """Lists the batch fields that a system can start from, one at a time; None is nothing."""
    found = []
    for field in (None, *GIVEN):
        try:
            system.check_condition(() if field is None else (field,))
        except ValueError:
            continue
        found.append(field)
    return found


def _evaluate(system: Any, workdir: Path) -> Command:
    """Measuring: numbers of solver steps where there is a solver, else the whole split."""
    words = ("launch/evaluate.py", "--workdir", str(workdir))
    if not isinstance(system, Generator):
        return Command("measure what comes back of the whole validation split", words)
    most = system.solver.steps
    steps = sorted({max(1, most // 4), max(1, most // 2), most})
    known = ",".join(str(n) for n in steps if _takes(system, n))
    return Command("what fewer solver steps cost", (*words, "--num", "64", "--steps", known))


def _takes(system: Generator, steps: int) -> bool:
    """Returns True if the solver can do with a number of steps."""
    try:
        with_options(system, steps=steps, guidance=None)
    except UserError:
        return False
    return True
