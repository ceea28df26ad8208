"""What prepared data holds: pairs, tokens and lengths by direction and split."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lsmoe_ds.config import Recipe
from lsmoe_ds.data.formats import SPLITS
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.languages import language_name


@dataclass(frozen=True)
class Row:
    """One direction and split. Lengths are tokens a sentence; ``unknown`` is the share of tokens that the vocabulary lacks."""

    direction: str
    split: str
    group: str
    pairs: int
    source_tokens: int
    target_tokens: int
    source_length: float
    target_length: float
    unknown: float


@dataclass(frozen=True)
class Summary:
    folder: str
    vocabulary: int
    languages: tuple[str, ...]
    rows: tuple[Row, ...]
    cleaning: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> Table:
        """For people: one line a direction, with the pairs of all splits."""
        table = Table(title=f"{self.folder}: {len(self.languages)} languages, vocabulary of {self.vocabulary:,}")
        for name in ("direction", "from", "into", "group"):
            table.add_column(name)
        for name in ("train", "dev", "test", "source tokens", "target tokens", "mean source", "mean target", "unknown %"):
            table.add_column(name, justify="right")
        rows = {(row.direction, row.split): row for row in self.rows}
        for train in (row for row in self.rows if row.split == "train"):
            source, target = map(language_name, train.direction.split("-"))
            counts = [f"{rows[train.direction, split].pairs:,}" for split in SPLITS]
            tokens = [f"{train.source_tokens:,}", f"{train.target_tokens:,}", f"{train.source_length:.1f}", f"{train.target_length:.1f}"]
            table.add_row(train.direction, source, target, train.group, *counts, *tokens, f"{100 * train.unknown:.2f}")
        return table


def show(recipe: Recipe) -> Summary:
    """Sums up the prepared data of a recipe. Raises UserError if it is not prepared or damaged."""
    data = PreparedData.open(recipe.prepared)
    rows = []
    for direction in data.languages.directions:
        splits = data.manifest["bitexts"][direction.bitext]
        group = recipe.data.groups.of(splits["train"]["pairs"])
        for split in SPLITS:
            pairs = splits[split]["pairs"]
            source, target = splits[split]["sides"][direction.source], splits[split]["sides"][direction.target]
            tokens = source["tokens"] + target["tokens"]
            rows.append(
                Row(
                    direction=str(direction),
                    split=split,
                    group=group,
                    pairs=pairs,
                    source_tokens=source["tokens"],
                    target_tokens=target["tokens"],
                    source_length=source["tokens"] / max(1, pairs),
                    target_length=target["tokens"] / max(1, pairs),
                    unknown=(source["unknown"] + target["unknown"]) / max(1, tokens),
                )
            )
    return Summary(str(data.folder), data.vocabulary.size, data.languages.codes, tuple(rows), data.manifest["cleaning"])
