"""Summarize prepared data: pairs, tokens and lengths by direction and split, and the notices."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.fingerprints import state_of
from lsmoe_ds.data.formats import SPLITS
from lsmoe_ds.data.prepared import LABELS, ONE_WAY, PreparedData, sides
from lsmoe_ds.directions import Direction
from lsmoe_ds.languages import language_name


@dataclass(frozen=True)
class Row:
    """The numbers of one direction and split.

    Lengths are tokens per sentence. ``unknown`` is the share of tokens that the vocabulary lacks.
    ``held_out`` is the number of training pairs dropped because one side is held out; 0 for dev and test.
    """

    direction: str
    split: str
    group: str
    pairs: int
    source_tokens: int
    target_tokens: int
    source_length: float
    target_length: float
    unknown: float
    held_out: int


@dataclass(frozen=True)
class Summary:
    """The summary of prepared data."""

    folder: str
    vocabulary: int
    languages: tuple[str, ...]
    rows: tuple[Row, ...]
    cleaning: dict[str, dict[str, int]]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """Return a table with a line for each direction; the notices are below."""
        title = f"{self.folder}: {len(self.languages)} languages, vocabulary of {self.vocabulary:,}"
        caption = Text("\n".join(self.notices), justify="left") if self.notices else None
        table = Table(title=Text(title), caption=caption)
        alone = all(Direction.parse(row.direction).alone for row in self.rows)
        for name in (
            ("language", "text", "with", "group") if alone else ("direction", "from", "into", "group")
        ):
            table.add_column(name)
        counted = ("source tokens", "target tokens", "mean source", "mean target")
        if alone:
            counted = ("tokens", "labels", "mean tokens", "mean labels")
        for name in (*SPLITS, "held out", *counted, "unknown %"):
            table.add_column(name, justify="right")
        rows = {(row.direction, row.split): row for row in self.rows}
        for train in (row for row in self.rows if row.split == "train"):
            parsed = Direction.parse(train.direction)
            source, target = language_name(parsed.source), language_name(parsed.target)
            target = LABELS if parsed.alone else target
            counts = [f"{rows[train.direction, split].pairs:,}" for split in SPLITS]
            tokens = [
                f"{train.source_tokens:,}",
                f"{train.target_tokens:,}",
                f"{train.source_length:.1f}",
                f"{train.target_length:.1f}",
            ]
            counts.append(f"{train.held_out:,}")
            table.add_row(
                parsed.label, source, target, train.group, *counts, *tokens, f"{100 * train.unknown:.2f}"
            )
        return table


def show(recipe: Recipe) -> Summary:
    """Summarize the prepared data of a recipe.

    Raises UserError if they are not prepared, prepared with other settings, or damaged.
    """
    data = PreparedData.of(recipe)
    state = state_of(recipe)
    changed = (
        ()
        if state.reason is None
        else (f"warning: 'lsmoe data prepare' would prepare these data again: {state.reason}",)
    )
    rows = []
    for direction in data.languages.directions:
        splits = data.manifest["bitexts"][direction.bitext]
        group = data.languages.groups.get(direction.source, "")
        if not direction.alone:
            group = recipe.data.groups.of_bitext(direction.bitext, splits["train"]["pairs"])
        for split in SPLITS:
            source, target = (splits[split]["sides"][side] for side in sides(direction))
            tokens, pairs = source["tokens"] + target["tokens"], splits[split]["pairs"]
            of_source, of_target = source["tokens"], target["tokens"]
            if ONE_WAY in splits[split]:
                own = data.tokens(direction, split)
                pairs = len(own)
                of_source, of_target = own.source.tokens, own.target.tokens
            rows.append(
                Row(
                    direction=str(direction),
                    split=split,
                    group=group,
                    pairs=pairs,
                    source_tokens=of_source,
                    target_tokens=of_target,
                    source_length=of_source / max(1, pairs),
                    target_length=of_target / max(1, pairs),
                    unknown=(source["unknown"] + target["unknown"]) / max(1, tokens),
                    held_out=data.manifest["cleaning"][direction.bitext].get("held out", 0)
                    if split == "train"
                    else 0,
                )
            )
    notices = (*data.manifest["notices"], *state.remarks, *changed)
    return Summary(
        str(data.folder),
        data.vocabulary.size,
        data.languages.codes,
        tuple(rows),
        data.manifest["cleaning"],
        notices,
    )
