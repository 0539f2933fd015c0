"""The means of the drift monitor's statistics over the calibration's items: one optional entry of its file.

A calibration without it, or with one of another version, serves as before; runs are then compared with their own start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.phrasing import VERSION

ALLOWED_ERRORS = 3.0
"""Standard errors of the calibration's mean by which a run may differ from it: the calibration is a sample, too."""

_MEANS, _ERRORS, _SHAPE = "drift_means", "drift_errors", "drift"


@dataclass(frozen=True, slots=True, eq=False)
class DriftReference:
    """What the calibration's items have on average."""

    columns: tuple[str, ...]
    """Names of the statistics."""

    means: NDArray[np.float64]
    """[columns]"""

    errors: NDArray[np.float64]
    """Standard errors of the means, which account for items of one prompt, [columns]."""

    num_items: int

    @property
    def allowed(self) -> NDArray[np.float64]:
        """The differences that the error of the means may explain, [columns]."""
        return ALLOWED_ERRORS * self.errors

    @property
    def certainty(self) -> NDArray[np.float64]:
        """Infinite where the mean is known, because `allowed` has its error; 0 where it is not, [columns]."""
        return np.where(np.isnan(self.means), 0.0, np.inf)

    def without(self, columns: Collection[str]) -> DriftReference:
        """Return the other statistics."""
        chosen = [index for index, name in enumerate(self.columns) if name not in columns]
        names = tuple(self.columns[index] for index in chosen)
        return DriftReference(names, self.means[chosen], self.errors[chosen], self.num_items)

    def aligned(self, columns: Sequence[str]) -> DriftReference:
        """Return the statistics in another order; NaN for those that the calibration lacks."""
        place = {name: index for index, name in enumerate(self.columns)}
        indices = [place.get(name, -1) for name in columns]
        means, errors = np.append(self.means, np.nan), np.append(self.errors, np.nan)
        return DriftReference(tuple(columns), means[indices], errors[indices], self.num_items)

    def pack(self, arrays: dict[str, NDArray[Any]], shapes: dict[str, Any]) -> None:
        """Add it to the content of a calibration file."""
        arrays[_MEANS], arrays[_ERRORS] = self.means, self.errors
        shapes[_SHAPE] = {"version": VERSION, "columns": list(self.columns), "items": self.num_items}

    @classmethod
    def unpack(cls, arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, Any]) -> DriftReference | None:
        """Return what `pack` wrote; None where the file has none, or one of another version.

        Raises:
            KeyError: an array is missing.
            ValueError: the arrays and the names differ in number.
        """
        shape = shapes.get(_SHAPE)
        if shape is None or shape["version"] != VERSION:
            return None
        columns = tuple(shape["columns"])
        means, errors = (np.asarray(arrays[name], np.float64) for name in (_MEANS, _ERRORS))
        if not len(columns) == len(means) == len(errors):
            raise ValueError("the drift reference has another number of statistics than of names")
        return cls(columns, means, errors, int(shape["items"]))
