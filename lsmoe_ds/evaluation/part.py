"""A share of some work, written ``I/N``, so that processes can divide the work without communicating."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lsmoe_ds.errors import UserError

T = TypeVar("T")
MOST = 9999  # shares


@dataclass(frozen=True)
class Part:
    """The ``number``-th, from 1, of ``count`` shares."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``3/8``. Raises UserError for anything else."""
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text)
        part = cls(int(found[1]), int(found[2])) if found else None
        if part is None or not 1 <= part.number <= part.count:
            raise UserError(
                f"'{text}' is no part: write I/N for the I-th of N, from 1 to N, N at most {MOST:,}, such "
                "as 3/8"
            )
        return part

    def of(self, items: Sequence[T]) -> list[T]:
        """Return every ``count``-th item. The sizes of parts differ by at most one; a part may be empty."""
        return list(items[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
