"""``lsmoe score``: score files of translations from any system, as ``lsmoe evaluate`` scores a model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lsmoe_ds.config.codes import read_code
from lsmoe_ds.data.formats import read_lines
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.comet import Comet
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.metrics import METRICS, WEAK, Tokenizer, make_metrics, score_corpus, shares
from lsmoe_ds.languages import language_name


@dataclass(frozen=True)
class FileScore:
    """The scores of one file of N lines.

    ``copy`` are the scores of copying the sources; ``exact`` and ``weak`` are shares of lines.
    """

    hypothesis: Path
    to: str | None
    sentences: int
    metrics: Metrics
    copy: Metrics | None
    exact: float
    weak: float
    signatures: dict[str, str]
    comet: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "hypothesis": str(self.hypothesis),
            "to": self.to,
            "sentences": self.sentences,
            **self.metrics.as_dict(),
            **({"comet": self.comet} if self.comet is not None else {}),
            **({"copy": self.copy.as_dict()} if self.copy else {}),
            "exact": self.exact,
            "weak": self.weak,
            "signatures": self.signatures,
        }

    def table(self) -> Table:
        """Make a table for a terminal: a line for each metric, with its signature."""
        into = f", {language_name(self.to)}" if self.to else ""
        title = f"{self.hypothesis}{into}, {self.sentences:,} sentences"
        caption = f"{self.exact:.0%} equal a reference, {self.weak:.0%} have a chrF below {WEAK:.0f}"
        table = Table(title=escape(title), caption=caption)
        for column, justify in (("metric", "left"), ("score", "right"), ("copying the source", "right")):
            if self.copy or "copying" not in column:
                table.add_column(column, justify=justify)  # type: ignore[arg-type]
        table.add_column("signature", overflow="fold")
        for name, shown in METRICS.items():
            copied = [f"{self.copy[name]:.1f}"] if self.copy else []
            table.add_row(shown, f"{self.metrics[name]:.1f}", *copied, self.signatures[name])
        if self.comet is not None:
            table.add_row(
                "COMET", f"{self.comet:.4f}", *([""] if self.copy else []), self.signatures["comet"]
            )
        return table


def score_files(
    hypothesis: Path,
    references: Sequence[Path],
    source: Path | None = None,
    to: str | None = None,
    tokenize: str | None = None,
    comet: Path | None = None,
) -> FileScore:
    """Score a file of translations against one or several files of references, line by line.

    ``to`` is the language; it decides BLEU's tokenizer unless ``tokenize`` names one. Raises UserError for
    files that cannot be read or have different numbers of lines.
    """
    if to is None and tokenize is None:
        raise UserError(
            "BLEU depends on the tokenization: give the language of the translations with --to, or --tokenize"
        )
    code = read_code(to) if to is not None else None
    tokenizer = Tokenizer.parse(tokenize) if tokenize is not None else None
    if comet is not None and source is None:
        raise UserError("--comet needs the sources, too: give --source")
    judge = Comet.open(comet) if comet is not None else None
    lines = {
        path: list(read_lines(path))
        for path in dict.fromkeys([hypothesis, *references, *([source] if source else [])])
    }
    count = len(lines[hypothesis])
    if not count:
        raise UserError(f"{hypothesis} holds no text")
    for path, found in lines.items():
        if len(found) != count:
            raise UserError(
                f"{hypothesis} has {count:,} lines but {path} has {len(found):,}: line by line they must "
                "belong together"
            )
    metrics, wanted = make_metrics(code or "", tokenizer), [lines[path] for path in references]
    scored = score_corpus(metrics, lines[hypothesis], wanted)
    copied = score_corpus(metrics, lines[source], wanted) if source else None
    signatures = {name: str(metric.get_signature()) for name, metric in metrics.items()}
    exact, weak = shares(lines[hypothesis], wanted)
    judged = None
    if judge and source:
        judged, signatures["comet"] = judge.score(lines[source], lines[hypothesis], wanted[0]), judge.name
    return FileScore(hypothesis, code, count, scored, copied, exact, weak, signatures, judged)
