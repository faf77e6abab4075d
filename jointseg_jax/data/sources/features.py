"""Arrays computed beforehand (latents, text or image features) beside the records of any source.

``ROOT/FIELD/SPLIT/ID.npy`` holds one array per record and field, all of one shape per field. They
travel through the pipeline as batch fields of the same names, float32, untouched by transforms: use
only transforms that are the same every time (no random crop, no flip) with them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jointseg_jax.data import files
from jointseg_jax.data.classes import Classes
from jointseg_jax.data.records import BadSample, Record, Source


@dataclass(frozen=True, kw_only=True)
class WithFeatures:
    """A source whose records also carry ``features``."""

    source: Source
    root: str  # folder of the features
    split: str
    fields: tuple[str, ...]  # names of the fields, which are also the names of their folders

    @property
    def name(self) -> str:
        """Names the source."""
        return self.source.name

    @property
    def classes(self) -> Classes:
        """The classes of the source."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        record = self.source[index]
        arrays = {field: self._read(field, record["id"]) for field in self.fields}
        return {**record, "features": arrays}

    def words(self) -> tuple[str, ...]:
        """Returns the words of the source."""
        return self.source.words()

    def fingerprint(self) -> dict[str, object]:
        """Returns the values of the source that must match when a run resumes, and the fields."""
        return {**self.source.fingerprint(), "features": sorted(self.fields)}

    def _read(self, field: str, name: str) -> np.ndarray:
        # Ids come from the data set, so the path is checked as those of a folder are.
        path = files.inside(Path(self.root), f"{field}/{self.split}/{name}.npy")
        try:
            # no pickle: an object array could run code
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            found = f"feature {field!r} cannot be read ({error})"
            rule = "one .npy file of numbers per record and field"
            remedy = "Compute it again, or leave the field out of config.data.*.features."
            raise BadSample(str(path), found, rule, remedy) from error
        if not np.isfinite(array).all():
            found = f"feature {field!r} holds NaN or infinity"
            raise BadSample(str(path), found, "all numbers must be finite", "Compute it again.")
        return array.astype(np.float32)
