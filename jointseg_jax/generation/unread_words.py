"""What a run cannot take of its prompts: words that it has never seen, and words beyond its length.

Pairs are made from the rest all the same, so it is said before they are, a line for each prompt,
and the manifest keeps it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jointseg_jax import build
from jointseg_jax.data.tokenizer import split
from jointseg_jax.training.workdir import Run

log = logging.getLogger("jointseg_jax")

LINES = 50
"""Prompts that are named at most."""


class Unread(NamedTuple):
    """Words of one prompt, in order; a prompt that has words at all."""

    unknown: tuple[str, ...] = ()  # not in the vocabulary of the run
    cut: tuple[str, ...] = ()  # behind the last one that is read
    wordless: bool = False  # characters, and no word among them

    def fields(self) -> dict[str, list[str]]:
        """Returns what the manifest says of it."""
        kinds = {"unknown_words": self.unknown, "cut_words": self.cut}
        return {name: list(words) for name, words in kinds.items() if words}


def unread_words(run: Run, prompts: Sequence[str]) -> dict[str, Unread]:
    """Returns the prompts that are not read whole; none of a run whose text is no words."""
    words = build.tokenizer(run.config.system, run.info.vocabulary)
    if words is None:
        return {}
    found = {
        prompt: Unread(
            words.unknown(prompt),
            words.truncated(prompt),
            bool(prompt.strip()) and not split(prompt),
        )
        for prompt in dict.fromkeys(prompts)
    }
    return {prompt: unread for prompt, unread in found.items() if any(unread)}


def say(found: Mapping[str, Unread]) -> None:
    """Logs a line for each prompt that is not read whole."""
    for prompt, unread in list(found.items())[:LINES]:
        parts = []
        if unread.unknown:
            parts.append(f"words that the run has never seen: {', '.join(unread.unknown)}")
        if unread.cut:
            parts.append(f"too long, its last words are cut: {' '.join(unread.cut)}")
        if unread.wordless:
            parts.append("no word in it, so it counts as the empty prompt")
        shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        log.warning("prompt %r: %s", shown, "; ".join(parts))
    if len(found) > LINES:
        log.warning("... and %d more prompts that are not read whole", len(found) - LINES)


def counts(found: Mapping[str, Unread]) -> dict[str, int]:
    """Returns how many prompts have unknown words and how many are cut, if any."""
    number = {
        "prompts_with_unknown_words": sum(bool(unread.unknown) for unread in found.values()),
        "prompts_cut": sum(bool(unread.cut) for unread in found.values()),
    }
    return {name: n for name, n in number.items() if n}
