"""The files of a data set folder, and what is known of their contents.

A file may have rotted into another valid picture, which no decoder can tell. Where the folder has a
list of SHA-256 sums, as ``sha256sum`` writes them, every file in it is held against it when it is
read; others are taken as they are. To make one:

  cd ROOT && find images annotations -type f -exec sha256sum {} + > SHA256SUMS
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jointseg_jax.data import files
from jointseg_jax.data.records import BadSample

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)")


@dataclass(frozen=True)
class Store:
    """Reads files from inside a folder only.

    Args:
      root: the folder.
      sums: SHA-256 by the name of the file, in lower case.
    """

    root: Path
    sums: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, root: Path) -> Store:
        """The store of a folder, with its list if it has one.

        Raises:
          BadSample: a line of the list that is none.
        """
        path = files.inside(root, SUMS)
        return cls(root, read_sums(path) if path.exists() else {})

    def path(self, name: str) -> Path:
        """The path of a file, which need not be there."""
        return files.inside(self.root, name)

    def read(self, name: str) -> tuple[Path, bytes]:
        """The path and the bytes of a file.

        Raises:
          BadSample: it cannot be read, or is not what the list says.
        """
        path = self.path(name)
        data = files.read(path)
        wanted = self.sums.get(name)
        if wanted is not None and (found := hashlib.sha256(data).hexdigest()) != wanted:
            raise BadSample(
                str(path),
                f"the contents have changed (SHA-256 {found[:12]}...)",
                f"{SUMS} says {wanted[:12]}...",
                f"Copy the file again from its source, or mend its line in {SUMS}.",
            )
        return path, data


def read_sums(path: Path) -> dict[str, str]:
    """Reads a list as ``sha256sum`` writes it."""
    sums = {}
    for number, line in enumerate(files.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise BadSample(
                f"{path}:{number}",
                f"{line[:60]!r} is no sum of a file",
                "lines are 64 hexadecimal digits, two spaces and a name",
                "Write the list again with sha256sum, or remove it.",
            )
        sums[found[2]] = found[1].lower()
    return sums
