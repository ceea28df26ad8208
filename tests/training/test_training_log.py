"""What a redirected log says of a training: a line soon, then by time, whatever `training.log_every` is."""

from __future__ import annotations

import json

import pytest

from lsmoe_ds.data.batches import Step
from lsmoe_ds.parallel.collectives import Traffic
from lsmoe_ds.training import monitor as module
from lsmoe_ds.training.engine import StepResult
from lsmoe_ds.training.monitor import Monitor


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def lines_of(
    clock,
    tmp_path,
    capsys,
    seconds: list[float],
    every: int,
    first: int = 0,
    pauses: dict[int, float] | None = None,
) -> list[str]:
    """Return the log lines of an invented training whose steps take ``seconds``.

    Step N has loss N, 10 x N target tokens and as many source tokens.
    """
    steps = first + len(seconds)
    traffic = {"encoder": Traffic(0, 0, 0.0), "decoder": Traffic(0, 0, 0.0)}
    with Monitor(tmp_path, steps, every, main=True) as monitor:
        monitor.start(first, None)
        for number, duration in enumerate(seconds, start=first + 1):
            clock.now += duration
            step = Step(
                batches=[], target_tokens=10 * number, source_tokens=10 * number, sentences=1, directions=[]
            )
            monitor.after_step(number, step, StepResult({"loss": float(number)}, None, 0.002, traffic))
            if pause := (pauses or {}).get(number):
                clock.now += pause
                monitor.pause(pause)
    return capsys.readouterr().err.splitlines()


def test_the_first_step_every_thirty_seconds_and_the_last_step(clock, tmp_path, capsys):
    lines = lines_of(clock, tmp_path, capsys, [10.0] * 9, every=1000)
    assert [line.split(" · ")[0] for line in lines] == ["step 1/9", "step 4/9", "step 7/9", "step 9/9"]
    # steps 2 to 4: (2 x 20 + 3 x 30 + 4 x 40) / 90 = 3.222; 180 tokens in 30 s; five steps of 10 s to go
    assert lines[1] == "step 4/9 · loss 3.222 · 6 tokens/s · lr 2.00e-03 · 0:00:50 left"
    assert lines[0].endswith("0:01:20 left") and lines[-1].endswith("0:00:00 left")


def test_quick_steps_do_not_fill_the_log_and_slow_ones_each_have_a_line(clock, tmp_path, capsys):
    quick = lines_of(clock, tmp_path, capsys, [0.1] * 200, every=1)
    assert [line.split(" · ")[0] for line in quick] == ["step 1/200", "step 200/200"]
    slow = lines_of(clock, tmp_path, capsys, [100.0] * 3, every=20)
    assert len(slow) == 3


def test_a_pause_is_not_in_the_rate_and_is_in_the_time_left_of_a_resumed_training(clock, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 1.0}) + "\n")
    lines = lines_of(clock, tmp_path, capsys, [10.0] * 6, every=1000, first=4, pauses={6: 60.0})
    assert [line.split(" · ")[0] for line in lines] == ["step 5/10", "step 7/10", "step 10/10"]
    # steps 6 and 7: 260 tokens in 20 s of training; three steps took 90 s with the pause, three are to go
    assert "13 tokens/s" in lines[1] and lines[1].endswith("0:01:30 left")
