"""The text of one corpus for one bitext and split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmoe_ds.data.iwslt import pair_segments, read_tagged
from lsmoe_ds.data.lines import read_aligned, read_lines
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import notice

QUOTED = 0.1  # report a table from this share of rows with quotes on


@dataclass(frozen=True)
class TextPart:
    """The text of one corpus for one bitext and split.

    It is two aligned files, in the order of the bitext's name; or one table; or, for the reader "pairs", a
    file whose pairs ``read`` yields. ``way`` is the only direction that trains on it, or None for both.
    """

    corpus: str
    bitext: str
    split: str
    files: tuple[Path, ...]
    reader: str  # lines, tagged, segments, table, pairs
    columns: tuple[int, int] = (0, 1)
    header: bool = False
    width: int = 2  # columns of a table
    way: str | None = None
    read: Callable[[Callable[[str], None]], Iterator[tuple[str, str]]] | None = None

    def pairs(self, tell: Callable[[str], None] = notice) -> Iterator[tuple[str, str]]:
        """Yield pairs of texts, in the order of the bitext's name, unchanged from the files.

        ``tell`` is called with a sentence about each possible fault of a readable file.
        """
        if self.reader == "table":
            yield from self._table(tell)
        elif self.read is not None:
            yield from self.read(tell)
        elif self.reader == "segments":
            yield from pair_segments(self.files[0], self.files[1], tell)
        elif self.reader == "tagged":
            yield from read_aligned(self.files[0], self.files[1], read_tagged, "text line")
        else:
            yield from read_aligned(self.files[0], self.files[1])

    def _table(self, tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
        seen = Counter[str]()
        yield from self.split_table(read_lines(self.files[0]), 1, seen)
        if remark := self.remark(seen):
            tell(remark)

    def split_table(self, lines: Iterable[str], first: int, seen: Counter[str]) -> Iterator[tuple[str, str]]:
        """Yield the pairs in a table's lines, whose numbers start at ``first`` (counted from 1).

        Counts its ``rows`` and how many of them are ``quoted`` in ``seen``. Raises UserError for a line
        with another number of columns.
        """
        for number, line in enumerate(lines, first):
            if self.header and number == 1:
                continue
            cells = line.split("\t")
            if len(cells) != self.width:
                as_in = "as in line 1" if self.header else "as there is no first line of language codes"
                what = f"{self.width} columns between tabs were expected, {as_in}"
                raise UserError(f"{self.files[0]}, line {number}: {what}; found {len(cells)}")
            seen["rows"] += 1
            seen["quoted"] += any(map(_is_quoted, cells))
            yield cells[self.columns[0]], cells[self.columns[1]]

    def remark(self, seen: Counter[str]) -> str | None:
        """Return a sentence about a table if many of its rows have quote marks around a field, or None."""
        if not seen["rows"] or seen["quoted"] / seen["rows"] < QUOTED:
            return None
        return (
            f"warning: {self.files[0]}: {seen['quoted'] / seen['rows']:.0%} of the rows have a field that "
            "begins and ends with a quote mark: quote marks are text here; if they only enclose the fields, "
            "write the table without them"
        )


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'
