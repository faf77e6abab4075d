"""Names of generated pairs, chosen once for all pairs of a folder so that no two are one.

| pair | name |
|---|---|
| from nothing but a prompt | its index in eight digits |
| the first from an item | the item's id |
| the second, third, ... from an item | ``ID-2``, ``ID-3``, ... |

Ids such as ``cat`` and ``cat-2`` (frames are numbered so) leave no room for that: all items of the
folder then have more dashes between id and number, as few as it takes (``cat--2``).
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from jointseg_jax.types import UserError

_NUMBERED = re.compile(r"(.*?)(-+)(?:[2-9]|[1-9]\d+)", re.DOTALL)


class PairNames:
    """The names of pairs made from items in turn.

    Args:
      ids: of the items; pair ``index`` is made from item ``index mod items``.

    Raises:
      UserError: two ids are one file on some file system.
    """

    def __init__(self, ids: Sequence[str]):
        self._ids, counts = tuple(ids), Counter(map(same_file, ids))
        if equal := [name for name in ids if counts[same_file(name)] > 1]:
            raise UserError(
                f"ERROR [given] ids {', '.join(map(repr, equal[:5]))} are the same, or differ by "
                "case or Unicode form only; pairs are named after them. Rename all but one."
            )
        self._dashes = _free_dashes(counts)

    def __call__(self, index: int) -> str:
        """Returns the name of a pair."""
        repeat, item = divmod(index, len(self._ids))
        return self._ids[item] + (f"{self._dashes}{repeat + 1}" if repeat else "")


def same_file(name: str) -> str:
    """Returns what names have in common that are one file on macOS or Windows."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _free_dashes(ids: Counter[str]) -> str:
    # The same for all ids: "cat" with two dashes and "cat-" with one would meet in "cat--2".
    taken = set()
    for name in ids:
        if found := _NUMBERED.fullmatch(name):
            stem, run = found.groups()
            # "cat--2" is "cat" with two dashes, and "cat-" with one
            splits = ((stem + run[:kept], len(run) - kept) for kept in range(len(run)))
            taken |= {count for before, count in splits if before in ids}
    return "-" * next(count for count in itertools.count(1) if count not in taken)
