"""Classes that may have been read as void: masks of 0 and 255, of which 255 is void by default.

A class that no label has, beside void that is frequent, is said where data are prepared, validated
and where training starts: everything would run, and the class would not be learnt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jointseg_jax.data.records import BadSample, Source, check_record

FREQUENT = 0.01  # share of void pixels from which on they may be a class
RECORDS = 16  # that are looked at where training starts


def lost_classes(names: Sequence[str], pixels: Sequence[int], void: int, looked: int) -> str:
    """Returns a sentence about classes that may have become void; "" where there are none.

    Args:
      pixels: per class, and ``void`` of those without annotation, in ``looked`` records.
    """
    unseen = [name for name, count in zip(names, pixels) if not count]
    share = void / max(void + sum(pixels), 1)
    if not unseen or share < FREQUENT:
        return ""
    more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
    return (
        f"{', '.join(map(repr, unseen[:5]))}{more} never occurs in {looked} records, while "
        f"{100 * share:.1f} % of their pixels are void (255 where nothing else is stated). If void "
        f'is a class here, say so in classes.json: "label_map": {{"0": {names[0]!r}, "255": '
        f"{unseen[0]!r}}}, or in config.data.*.label_map."
    )


def first_look(source: Source) -> str:
    """Returns ``lost_classes`` of a few records spread over a source, where that can tell."""
    count, classes = len(source), len(source.classes)
    if classes > RECORDS:  # most classes of a long list are in none of a few records
        return ""
    pixels, looked = np.zeros(classes + 1, np.int64), 0
    for number in range(min(RECORDS, count)):
        try:
            record = source[number * count // min(RECORDS, count)]
            check_record(record, source.classes)
        except BadSample:  # reported where it is read for a batch
            continue
        labels = record["labels"]
        values = np.where(labels < 0, classes, labels).ravel()
        pixels += np.bincount(values, minlength=classes + 1)
        looked += 1
    return lost_classes(source.classes.names, pixels[:-1].tolist(), int(pixels[-1]), looked)
