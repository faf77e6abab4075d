"""The measures of scenes for people: a table (generated, real renders, chance), or a line."""

from collections.abc import Mapping
from typing import Any

from jointseg_jax.evaluation.scene_report import FITTING

TITLES = {
    "alignment_miou": "mask fits its image (alignment mIoU)",
    "obedience": "pixels of a class that was asked for",
    "recall": "words of the prompt that are there",
    "precision": "classes there that were asked for",
    "recall_things": "things asked for that are there",
    "precision_things": "things there that were asked for",
    "right_counts": "pictures with all things as many times as asked",
    "shape_image": "shape of the things, image (IoU with template)",
    "shape_mask": "shape of the things, mask",
    "fitting_image": f"things whose shape is right (IoU >= {FITTING}), image",
    "fitting_mask": "things whose shape is right, mask",
    "named_by_shape": "things cut out that are named by shape alone",
    "fragments": "fragments of things a picture",
}
"""What each measure is, in the order of the table; ``scene_report.py`` defines them."""

COLUMNS = {"generated": "scenes", "real renders": "scenes_real", "chance": "scenes_chance"}
"""Fields of a report by their title."""


def scene_tables(report: Mapping[str, Any]) -> str:
    """Returns the table of a report, or one for each number of steps; empty without scenes."""
    return "".join(
        _table(report | row, f"solver steps: {row['steps']}" if "steps" in row else "measure")
        for row in report.get("table", [{}])
        if "scenes" in report | row
    )


LINE = {
    "alignment_miou": "mask fits image {:.2f}",
    "obedience": "pixels as asked {:.2f}",
    "recall_things": "things: {:.2f} of those asked for are there",
    "precision_things": "{:.2f} of those there were asked for",
}
"""What a line says of each measure; real renders have 1."""


def scene_line(measures: Mapping[str, float]) -> str:
    """Returns a few measures as one line; empty without any."""
    return ", ".join(text.format(measures[k]) for k, text in LINE.items() if k in measures)


def _table(report: Mapping[str, Any], title: str) -> str:
    columns = [report.get(field, {}) for field in COLUMNS.values()]
    rows = [[title, *COLUMNS]]
    for name, words in TITLES.items():
        if name in columns[0]:
            rows.append([words, *(_cell(column.get(name)) for column in columns)])
    width = max(len(row[0]) for row in rows)
    return "".join(
        f"{row[0]:<{width}}" + "".join(f"{c:>14}" for c in row[1:]) + "\n" for row in rows
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
