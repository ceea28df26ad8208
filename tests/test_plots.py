"""The parts of curves and of numbers in the pages: ticks, smoothing, durations."""

from __future__ import annotations

import pytest

from lsmoe_ds.analysis.plots import number, smooth, thin, ticks
from lsmoe_ds.pages import duration, short_count


def test_ticks_are_round_and_span_the_values() -> None:
    assert ticks(0, 4000) == [0, 1000, 2000, 3000, 4000]
    assert ticks(2.6, 8.9) == [2, 4, 6, 8, 10]
    assert ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]
    for low, high in ((0.001, 0.0011), (-5, 1e9), (0, 1)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8


def test_smoothing_keeps_lines_and_lessens_noise() -> None:
    line = [(float(x), 2.0 * x) for x in range(50)]
    assert [y for _, y in smooth(line, 5)] == pytest.approx([y for _, y in line])
    noisy = [(float(x), (-1.0) ** x) for x in range(50)]
    assert max(abs(y) for _, y in smooth(noisy, 5)[5:-5]) < 0.2
    assert len(thin(line, 10)) == 10 and thin(line, 10)[-1] == line[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (42, "42 s"), (59.7, "1 min"), (485, "8 min 5 s"), (3 * 3600 + 1201, "3 h 20 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers() -> None:
    assert [number(v) for v in (12500, 0.75, 1.5e-4, 0)] == ["12,500", "0.75", "1.5e-4", "0"]
    assert [short_count(v) for v in (950, 12_300, 41_230_000, 1.5e9)] == ["950", "12.3 k", "41.2 M", "1.5 B"]
