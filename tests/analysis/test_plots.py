"""The parts of curves and of numbers in the pages: ticks, smoothing, durations."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from lsmoe_ds.analysis.curves import LETTER, LINE, WIDTH, draw_curve
from lsmoe_ds.analysis.plots import number, smooth, thin, ticks
from lsmoe_ds.methods.findings import Curve
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


def test_labels_beside_points_do_not_cover_one_another():
    points = [(10.0, 30.0 + number / 10, f"a row of number {number}") for number in range(12)]
    points += [(20.0, 30.5, "at the right edge"), (0.5, 30.5, "at the left edge")]
    svg = draw_curve(Curve("c", "title", "", "x", "y", points, joined=False))
    found = re.findall(r'<text class="(|end)" x="(\d+)" y="(\d+)">([^<]*)</text>', svg)
    assert sorted(label for *_, label in found) == sorted(label for *_, label in points)
    boxes = []
    for anchor, x, y, label in found:
        left = int(x) - LETTER * len(label) * (anchor == "end")
        boxes.append((left, left + LETTER * len(label), int(y)))
    assert all(left >= 0 and right <= WIDTH for left, right, _ in boxes)
    for (one, end, y), (other, last, at) in combinations(boxes, 2):
        assert abs(y - at) >= LINE - 1 or end <= other or last <= one


def test_a_curve_joins_its_points():
    svg = draw_curve(Curve("c", "title", "", "million", "chrF++", [(1, 20.0, "2"), (8, 25.5, "16")]))
    assert svg.count("<circle") == 2 and 'class="line"' in svg and ">16</text>" in svg
