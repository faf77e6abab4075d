"""A tokenizer over a fixed vocabulary: caption -> word ids, on the host.

1. Lower-case, then split into runs of letters (any alphabet); everything else separates.
2. Id 0 pads, id 1 is an unknown word, id 2 + i is ``vocabulary[i]``.
3. Captions are cut or padded to ``length``; the empty prompt is all padding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from jointseg_jax.data.records import Source

PADDING = 0
UNKNOWN = 1
_LETTERS = re.compile(r"[^\W\d_]+")  # word characters of any alphabet, less digits and "_"


def split(caption: str) -> list[str]:
    """Splits a caption into lower-case words of letters."""
    return _LETTERS.findall(caption.lower())


@dataclass(frozen=True, kw_only=True)
class Words:
    """Turns captions into ids of a fixed vocabulary; the same ids for the same vocabulary."""

    vocabulary: tuple[str, ...]  # different lower-case words of letters; their order fixes the ids
    length: int  # ids per caption
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        if self.length < 1:
            raise ValueError(f"Words.length is {self.length}; give at least 1")
        # ``encode`` splits captions: a word that ``split`` would change could never be found.
        odd = [word for word in self.vocabulary if split(word) != [word]]
        if odd:
            raise ValueError(
                f"Words.vocabulary holds {odd[:5]} ({len(odd)} such entries); "
                "entries must be single lower-case words of letters: see tokenizer.split"
            )
        ids = {word: UNKNOWN + 1 + i for i, word in enumerate(self.vocabulary)}
        if len(ids) != len(self.vocabulary):
            duplicates = sorted({w for w in self.vocabulary if self.vocabulary.count(w) > 1})
            raise ValueError(f"Words.vocabulary holds {duplicates[:5]} twice; words must differ")
        object.__setattr__(self, "_ids", ids)

    @property
    def size(self) -> int:
        """Number of ids: the vocabulary, padding and the unknown word."""
        return UNKNOWN + 1 + len(self.vocabulary)

    def encode(self, caption: str) -> Int32[np.ndarray, " words"]:
        """Returns the ids of a caption, cut or padded to the length."""
        tokens = self.empty()
        ids = [self._ids.get(word, UNKNOWN) for word in split(caption)[: self.length]]
        tokens[: len(ids)] = ids
        return tokens

    def empty(self) -> Int32[np.ndarray, " words"]:
        """Returns the empty prompt."""
        return np.full(self.length, PADDING, np.int32)

    def decode(self, tokens: Int32[np.ndarray, " words"]) -> str:
        """Returns the words of token ids, without padding; unknown words read ``?``."""
        names = ("", "?", *self.vocabulary)  # of ids PADDING, UNKNOWN and those behind them
        for i in tokens.tolist():
            if not 0 <= i < self.size:
                raise ValueError(f"Words.decode: id {i} given; ids are 0..{self.size - 1}")
        return " ".join(names[i] for i in tokens.tolist() if i != PADDING)

    def unknown(self, caption: str) -> tuple[str, ...]:
        """Lists the words of a caption that are not in the vocabulary, in order."""
        return tuple(dict.fromkeys(w for w in split(caption) if w not in self._ids))

    def truncated(self, caption: str) -> tuple[str, ...]:
        """Lists the words of a caption that do not fit into the length, in order."""
        return tuple(split(caption)[self.length :])


def vocabulary_of(*sources: Source) -> tuple[str, ...]:
    """Lists the words that the captions of some sources can contain, sorted."""
    listed = (words for source in sources for words in source.words())
    return tuple(sorted({word for words in listed for word in split(words)}))


def longest(captions: Sequence[str]) -> int:
    """Returns the number of words of the longest caption, for choosing a length."""
    return max((len(split(caption)) for caption in captions), default=0)
