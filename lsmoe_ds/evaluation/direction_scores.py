"""The scores of one direction, or of another task in one language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lsmoe_ds.config.host import Task
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.groups import Metrics
from lsmoe_ds.evaluation.metrics import TASKS, Tokenizer, make_metrics, score_corpus, shares


@dataclass(frozen=True)
class Sample:
    """One sentence of the test set, the model's translation or other answer, and the reference."""

    source: str
    hypothesis: str
    reference: str


@dataclass(frozen=True)
class DirectionScore:
    """The scores of one direction, or of another ``task`` in one language.

    ``copy`` are the scores of copying the sources. ``exact`` and ``weak`` are the shares (0 to 1) of
    sentences that equal the reference, and whose chrF is below :data:`~lsmoe_ds.evaluation.metrics.WEAK`.
    ``seconds`` is the time of translating. ``comet`` is COMET's system score. Only translations have
    ``copy``, ``exact``, ``weak`` and ``signatures``.
    """

    direction: Direction
    metrics: Metrics
    copy: Metrics | None
    sentences: int
    exact: float
    weak: float
    seconds: float
    signatures: dict[str, str]
    samples: tuple[Sample, ...]
    comet: float | None = None
    task: Task = "translate"

    def to_dict(self) -> dict[str, Any]:
        """Return the scores in the form of a table's JSON."""
        translates = self.task == "translate"
        return {
            **self.metrics.as_dict(),
            **({"comet": self.comet} if self.comet is not None else {}),
            **({"copy": self.copy.as_dict()} if self.copy is not None else {}),
            "sentences": self.sentences,
            **({"exact": self.exact, "weak": self.weak} if translates else {}),
            "seconds": self.seconds,
            **({"signatures": self.signatures} if translates else {}),
            "samples": [asdict(sample) for sample in self.samples],
        }

    @classmethod
    def from_dict(cls, task: Task, direction: Direction, value: Mapping[str, Any]) -> DirectionScore:
        """Read what :meth:`to_dict` returned. Raises ValueError, TypeError or KeyError for anything else."""
        names, translates = TASKS[task].titles, task == "translate"
        if direction.alone == translates:
            raise ValueError(f"{direction} is no {TASKS[task].unit}")

        def metrics(of: Mapping[str, Any]) -> Metrics:
            return Metrics({name: float(of[name]) for name in names})

        signed = value["signatures"] if translates else {}
        return cls(
            task=task,
            direction=direction,
            metrics=metrics(value),
            copy=metrics(value["copy"]) if translates else None,
            sentences=int(value["sentences"]),
            exact=float(value["exact"]) if translates else 0.0,
            weak=float(value["weak"]) if translates else 0.0,
            seconds=float(value["seconds"]),
            signatures={name: str(signed[name]) for name in dict.fromkeys([*names, *signed])}
            if translates
            else {},
            samples=tuple(
                Sample(str(s["source"]), str(s["hypothesis"]), str(s["reference"])) for s in value["samples"]
            ),
            comet=None if value.get("comet") is None else float(value["comet"]),
        )


def score_direction(
    direction: Direction,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    seconds: float = 0.0,
    samples: int = 5,
    tokenizer: Tokenizer | None = None,
) -> DirectionScore:
    """Score N detokenized ``hypotheses``, and the N ``sources`` as a copy, against N ``references``.

    Raises UserError if there is no line, ValueError if the numbers of lines differ.
    """
    shown = spread_samples(direction, sources, hypotheses, references, samples)
    metrics = make_metrics(direction.target, tokenizer)
    exact, weak = shares(hypotheses, [references])
    return DirectionScore(
        direction=direction,
        metrics=score_corpus(metrics, hypotheses, [references]),
        copy=score_corpus(metrics, sources, [references]),
        sentences=len(references),
        exact=exact,
        weak=weak,
        seconds=seconds,
        signatures={name: str(metric.get_signature()) for name, metric in metrics.items()},
        samples=shown,
    )


def spread_samples(
    direction: Direction,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    samples: int,
) -> tuple[Sample, ...]:
    """Choose samples spread evenly over the N lines that are to be scored, not hand-picked.

    Raises UserError if there is no line, ValueError if the numbers of lines differ.
    """
    if not len(sources) == len(hypotheses) == len(references):
        raise ValueError(
            f"{direction.label}: {len(sources)} sources, {len(hypotheses)} hypotheses and {len(references)} "
            "references"
        )
    if not references:
        raise UserError(
            f"{direction.label} has no sentences to score: 'data.held_out' must keep at least one of this "
            "split"
        )
    shown = min(samples, len(references))
    chosen = (k * len(references) // shown for k in range(shown))
    return tuple(Sample(sources[i], hypotheses[i], references[i]) for i in chosen)
