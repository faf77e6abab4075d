"""A tokenizer over a fixed vocabulary: caption -> word ids, on the host.

1. Lower-case, then split into runs of letters (any alphabet) and their marks (accents, vowel signs,
   points); everything else separates.
2. Id 0 pads, id 1 is an unknown word, id 2 + i is ``vocabulary[i]``.
3. Captions are cut or padded to ``length``; the empty prompt is all padding.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32

from jointseg_jax.data.records import Source

PADDING = 0
UNKNOWN = 1
_LETTERS = re.compile(r"[^\W\d_]+")  # word characters of any alphabet, less digits and "_"
# Soft hyphen, grapheme joiner, direction marks, word joiner, byte order mark, variation selectors:
# they change how a word looks, not which word it is.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180b-\u180d\u180f\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069"
    "\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]"
)
# Zero-width non-joiner and joiner: they tell words of Persian and of Indian languages apart.
_JOINERS = "\u200c\u200d"


def split(caption: str) -> list[str]:
    """Splits a caption into lower-case words of letters, in Unicode's composed form (NFC)."""
    if caption.isascii():
        return _LETTERS.findall(caption.lower())
    text = folded(_INVISIBLE.sub("", caption))
    words = "".join(c if _of_word(c) else " " for c in text).split()
    # A mark without a letter before it is no word: a sign drawn as an emoji ends in such marks.
    started = (word[_first_letter(word) :].rstrip(_JOINERS) for word in words)
    return [word for word in started if word]


def folded(text: str) -> str:
    """Returns text in lower case and composed, so that equal words are equal strings."""
    lower = unicodedata.normalize("NFC", text).lower()
    # Turkish capital I with a dot becomes "i" and a dot of its own, which nobody types.
    return unicodedata.normalize("NFC", lower.replace("i\u0307", "i"))


def _letter(character: str) -> bool:
    """Returns True for what ``_LETTERS`` finds: no digits, but superscripts and the like."""
    return character.isalnum() and not character.isdecimal()


def _of_word(character: str) -> bool:
    # Python's \w knows letters and not the marks that belong to them.
    mark = unicodedata.category(character).startswith("M")
    return _letter(character) or mark or character in _JOINERS


def _first_letter(word: str) -> int:
    return next((i for i, character in enumerate(word) if _letter(character)), len(word))


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
        # ``encode`` splits captions: a word that ``split`` would change could never be found, but
        # for its form: vocabularies from before words were composed go on.
        odd = [word for word in self.vocabulary if split(word) != [_composed(word)]]
        if odd:
            raise ValueError(
                f"Words.vocabulary holds {odd[:5]} ({len(odd)} such entries); "
                "entries must be single lower-case words of letters: see tokenizer.split"
            )
        if len(set(self.vocabulary)) != len(self.vocabulary):
            duplicates = sorted({w for w in self.vocabulary if self.vocabulary.count(w) > 1})
            raise ValueError(f"Words.vocabulary holds {duplicates[:5]} twice; words must differ")
        ids: dict[str, int] = {}
        for i, word in enumerate(self.vocabulary):
            ids.setdefault(_composed(word), UNKNOWN + 1 + i)
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


def _composed(word: str) -> str:
    return unicodedata.normalize("NFC", word)


def vocabulary_of(*sources: Source) -> tuple[str, ...]:
    """Lists the words that the captions of some sources can contain, sorted."""
    listed = (words for source in sources for words in source.words())
    return tuple(sorted({word for words in listed for word in split(words)}))


def longest(captions: Sequence[str]) -> int:
    """Returns the number of words of the longest caption, for choosing a length."""
    return max((len(split(caption)) for caption in captions), default=0)
