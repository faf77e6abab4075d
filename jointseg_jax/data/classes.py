"""What the values of a label map mean: names, things and stuff, colours, left/right pairs."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

Colour = tuple[int, int, int]

VOID_COLOUR: Colour = (224, 224, 192)
"""Colour of pixels without annotation, as PASCAL VOC paints its border."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a data set in index order; plain values, so hashable and picklable."""

    names: tuple[str, ...]
    isthing: tuple[bool, ...] = ()  # per class, True if it is countable; all False by default
    palette: tuple[Colour, ...] = ()  # per class; VOC's colours by default
    swaps: tuple[tuple[int, int], ...] = ()  # pairs of indices that a left/right flip exchanges
    void: str = "void"  # the name of what is not annotated

    def __post_init__(self) -> None:
        _check_names(self.names, self.void)
        # Filled in here, so that lists with and without the defaults are equal. The 256 colours of
        # VOC are repeated where a list is longer than 8-bit files can hold.
        count, colours = len(self.names), voc_palette(256)
        plain = tuple(colours[i % 256] for i in range(count))
        for field, default in (("isthing", (False,) * count), ("palette", plain)):
            value = getattr(self, field) or default
            object.__setattr__(self, field, value)
            if len(value) != count:
                raise ValueError(
                    f"Classes.{field} has {len(value)} entries for {count} names; give one per "
                    f"name, or leave {field} out"
                )
        _check_numbers(self.palette, self.swaps, count)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Returns the index of a class by its name."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise KeyError(f"no class {name!r}; the {len(self)} classes are {known}")
        return self.names.index(name)

    @property
    def things(self) -> tuple[int, ...]:
        """Lists the indices of the countable classes."""
        return tuple(i for i, thing in enumerate(self.isthing) if thing)

    @property
    def stuff(self) -> tuple[int, ...]:
        """Lists the indices of the uncountable classes."""
        return tuple(i for i, thing in enumerate(self.isthing) if not thing)

    @property
    def colours(self) -> UInt8[np.ndarray, "classes 3"]:
        """Returns the palette as an array."""
        return np.asarray(self.palette, np.uint8)

    @property
    def swap_table(self) -> np.ndarray:
        """Returns the index that each class becomes under a left/right flip (int16 [classes])."""
        table = np.arange(len(self), dtype=np.int16)
        for left, right in self.swaps:
            table[left], table[right] = right, left
        return table


def voc_palette(n: int) -> tuple[Colour, ...]:
    """Returns the PASCAL VOC colours of indices 0 .. n-1.

    Bits 0, 1, 2 of the index are the top bits of red, green and blue, bits 3, 4, 5 the next
    ones, and so on: 256 distinct colours.
    """
    if not 0 <= n <= 256:
        raise ValueError(f"voc_palette: {n} colours asked for; 8-bit label files hold 0 to 256")
    # index bit 3 * digit + channel -> bit 7 - digit of that channel
    index = np.arange(n)[:, None]
    channel = np.arange(3)[None, :]
    colours = np.zeros((n, 3), int)
    for digit in range(3):
        colours |= ((index >> (3 * digit + channel)) & 1) << (7 - digit)
    return tuple((r, g, b) for r, g, b in colours.tolist())


def _check_names(names: tuple[str, ...], void: str) -> None:
    if not names:
        raise ValueError("Classes.names is empty; give at least one class name")
    if duplicates := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"Classes.names holds {', '.join(duplicates)} twice; names must differ")
    if void in names:
        raise ValueError(f"Classes.void {void!r} is also a class name; choose another void name")


def _check_numbers(
    palette: tuple[tuple[int, ...], ...], swaps: tuple[tuple[int, ...], ...], n: int
) -> None:
    for i, colour in enumerate(palette):
        if len(colour) != 3 or not all(0 <= c <= 255 for c in colour):
            raise ValueError(f"Classes.palette[{i}] is {colour}; give three integers in 0..255")
    flat = [i for pair in swaps for i in pair]
    disjoint = all(len(pair) == 2 for pair in swaps) and len(set(flat)) == len(flat)
    if not disjoint or any(not 0 <= i < n for i in flat):
        raise ValueError(
            f"Classes.swaps is {swaps}; give disjoint pairs of different indices in 0..{n - 1}"
        )
