"""Test whether two systems' scores on the same text differ by more than chance, by direction and in the mean.

In one direction both tests are sacrebleu's :class:`~sacrebleu.significance.PairedTest`: paired bootstrap
resampling (Koehn, 2004) and approximate randomization (Riezler and Maxwell, 2005). Over several directions
the statistic is the plain mean of their scores, as in our averages: trial i of the mean is the mean of trial
i of all directions. All directions use the same random numbers, so in a multi-way parallel test set
a line is resampled, or exchanged, in all directions together.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

TRIALS = 10  # randomization trials per bootstrap resample, as in sacrebleu's defaults
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """The score of a system on one text by one metric.

    ``mean`` and ``ci`` (half of the 95 % interval) are from the bootstrap. The other fields compare the
    system with the baseline, and are None for the baseline itself: the difference, its 95 % interval, and the
    two p-values.
    """

    score: float
    mean: float
    ci: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_bootstrap: float | None = None
    p_randomization: float | None = None

    def to_dict(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def differs(self) -> bool:
        """Tell whether both tests find the difference significant at 0.05."""
        return self.p_bootstrap is not None and max(self.p_bootstrap, self.p_randomization or 0.0) < 0.05


@dataclass(frozen=True)
class Trials:
    """The scores of a baseline and a system on their text, N bootstrap resamples and T randomizations."""

    scores: Floats  # [2]
    resampled: Floats  # [2, N]
    randomized: Floats  # [2, T]

    @classmethod
    def mean(cls, several: Sequence[Trials]) -> Trials:
        """Average the trials of at least one direction."""
        fields = ("scores", "resampled", "randomized")
        return cls(*(np.mean([getattr(trials, field) for trials in several], axis=0) for field in fields))

    def baseline(self) -> Outcome:
        low, high = interval(self.resampled[0])
        return Outcome(float(self.scores[0]), float(self.resampled[0].mean()), (high - low) / 2)

    def outcome(self) -> Outcome:
        """Compare the system with the baseline as sacrebleu does.

        The bootstrap's p is the share of resamples whose absolute difference, minus the mean absolute
        difference, exceeds the observed one. The randomization's p is the share of trials whose absolute
        difference exceeds it. If the observed difference is 0, both are 1; sacrebleu would return the
        smallest possible values if the differences of all trials were 0 as well, because none exceeds 0.
        """
        low, high = interval(self.resampled[1])
        differences = self.resampled[1] - self.resampled[0]
        observed = abs(self.scores[1] - self.scores[0])
        centered = np.abs(differences) - np.abs(differences).mean()
        return Outcome(
            float(self.scores[1]),
            float(self.resampled[1].mean()),
            (high - low) / 2,
            float(self.scores[1] - self.scores[0]),
            *interval(differences),
            _p_value(centered, observed),
            _p_value(np.abs(self.randomized[0] - self.randomized[1]), observed),
        )


def interval(values: Floats) -> tuple[float, float]:
    """Return the 95 % interval of resampled values, with the same order statistics as sacrebleu."""
    ordered, cut = np.sort(values), len(values) // 40
    return float(ordered[cut]), float(ordered[-cut - 1])


def _p_value(statistics: Floats, observed: float) -> float:
    if observed == 0:
        return 1.0
    return float((np.sum(statistics > observed) + 1) / (len(statistics) + 1))


class Recorder(Metric):
    """A metric for sacrebleu's tests that records every score they compute, in their order."""

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric, self.scores = metric, list[float]()
        self._statistics: dict[int, Any] = {}

    def get_signature(self) -> Any:
        return self.metric.get_signature()

    def _extract_corpus_statistics(self, hypotheses: Sequence[str], references: Any) -> Any:
        """Count a system's n-grams once, although both tests ask for them.

        The counts are floats, which numpy multiplies many times faster.
        """
        if id(hypotheses) not in self._statistics:
            counts = self.metric._extract_corpus_statistics(hypotheses, references)
            self._statistics[id(hypotheses)] = np.array(counts, dtype=np.float64)
        return self._statistics[id(hypotheses)]

    def _keep(self, score: Any) -> Any:
        self.scores.append(float(score.score))
        return score

    def _compute_score_from_stats(self, stats: Any) -> Any:
        return self._keep(self.metric._compute_score_from_stats(stats))

    def _aggregate_and_compute(self, stats: Any) -> Any:
        return self._keep(self.metric._aggregate_and_compute(stats))

    def _preprocess_segment(self, sent: str) -> str:
        return self.metric._preprocess_segment(sent)

    def _extract_reference_info(self, refs: Any) -> Any:
        return self.metric._extract_reference_info(refs)

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: Any) -> Any:
        return self.metric._compute_segment_statistics(hypothesis, ref_kwargs)


def run_trials(
    systems: Sequence[Sequence[str]],
    references: Sequence[str],
    metrics: Mapping[str, Metric],
    samples: int,
    seed: int,
) -> tuple[dict[str, list[Trials]], dict[str, str]]:
    """Run sacrebleu's two tests on N lines of S systems; the first system is the baseline.

    Returns by metric the trials of each of the S - 1 other systems, and the signature, which includes the
    seed and the numbers of trials.
    """
    recorders = {name: Recorder(metric) for name, metric in metrics.items()}
    named = [(str(index), lines) for index, lines in enumerate(systems)]
    found: dict[str, dict[str, Floats]] = {name: {} for name in metrics}
    signatures: dict[str, str] = {}
    for kind, count in (("bs", samples), ("ar", TRIALS * samples)):
        with _seeded(seed):
            signed, _ = PairedTest(named, recorders, [list(references)], test_type=kind, n_samples=count)()
        for name, signature in zip(metrics, signed.values(), strict=True):
            extra = f"|ar:{TRIALS * samples}" if kind == "bs" else ""
            signatures.setdefault(name, f"{signature}{extra}")
        # Recorded are the baseline's score (for the bootstrap also its resamples), then for each system its
        # score and both sides' trials.
        before = 1 + (count if kind == "bs" else 0)
        for name, recorder in recorders.items():
            found[name][kind] = np.array(recorder.scores[before:]).reshape(len(systems) - 1, 1 + 2 * count)
            found[name]["baseline"] = np.array(recorder.scores[0])
            recorder.scores.clear()
    trials = {
        name: [
            Trials(np.array([of["baseline"], bs[0]]), bs[1:].reshape(2, -1), ar[1:].reshape(2, -1))
            for bs, ar in zip(of["bs"], of["ar"], strict=True)
        ]
        for name, of in found.items()
    }
    return trials, signatures


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Give sacrebleu's tests a seed, which they read from the environment."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before
