"""Which documents of a batch a rule refuses, and the number that decided."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class Verdicts:
    """For each document the first check it failed, with its value; an empty rule for those that passed."""

    num_documents: int
    rule: list[str] = field(init=False)
    value: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.rule = [""] * self.num_documents
        self.value = np.full(self.num_documents, np.nan)

    @property
    def unrefused(self) -> npt.NDArray[np.bool_]:
        """Documents that have failed nothing so far."""
        return np.array([not rule for rule in self.rule], dtype=bool)

    def refuse(self, failed: npt.NDArray[np.bool_], rule: str, value: npt.NDArray[Any]) -> None:
        """Note the documents that fail here and failed nothing before."""
        for number in np.flatnonzero(failed).tolist():
            if not self.rule[number]:
                self.rule[number] = rule
                self.value[number] = float(value[number])
