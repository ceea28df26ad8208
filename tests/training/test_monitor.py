"""What a training records: averages by tokens, rates, and what is left of a record when a run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from support.invented_steps import result, step

from lsmoe_ds.training import monitor as module
from lsmoe_ds.training.monitor import Monitor


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def clock():
    """Yield a stub of the clock, which stands still until a test sets its ``return_value``."""
    with mock.patch.object(module.time, "perf_counter") as now:
        now.return_value = 100.0
        yield now


def test_a_record_averages_its_steps_by_their_target_tokens(tmp_path):
    """Losses 1 and 2 of 10 and 30 tokens: (10 + 60) / 40."""
    names = ("nll", "distillation", "balance", "z_loss", "dropped", "gates")
    with Monitor(tmp_path, steps=4, every=2, main=True) as monitor:
        monitor.start(0, None)
        monitor.after_step(
            1,
            step(10),
            result(1.0, **{name: 10.0 * i for i, name in enumerate(names, start=1)}, learning_rate=0.1),
        )
        monitor.after_step(
            2,
            step(30),
            result(
                2.0,
                **{name: 20.0 * i for i, name in enumerate(names, start=1)},
                learning_rate=0.3,
                grad_norm=7.0,
            ),
        )
        monitor.after_step(3, step(10), result(5.0))
        monitor.after_step(4, step(10), result(3.0))
    first, second = records(tmp_path)
    assert first["loss"] == pytest.approx(1.75)
    assert [first[name] for name in names] == pytest.approx([17.5 * i for i in range(1, 7)])
    own = (first["step"], first["learning_rate"], first["grad_norm"])
    assert own == (2, 0.3, 7.0), "of the last step alone"
    assert (second["step"], second["loss"], second["nll"]) == (4, 4.0, 4.0), "a record begins anew"


def test_the_last_step_is_recorded_whatever_its_number(tmp_path):
    with Monitor(tmp_path, steps=5, every=2, main=True) as monitor:
        monitor.start(0, None)
        for number in range(1, 6):
            monitor.after_step(number, step(10), result(float(number)))
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [
        (2, 1.5),
        (4, 3.5),
        (5, 5.0),
    ]


def test_the_rate_counts_tokens_of_both_sides_and_leaves_out_what_was_not_training(tmp_path, clock):
    """Twice 5 + 10 tokens in 20 seconds, of which 14 went into a checkpoint; then 15 in 3."""
    with Monitor(tmp_path, steps=3, every=2, main=True) as monitor:
        monitor.start(0, None)
        monitor.after_step(1, step(10, away=1), result(1.0))
        clock.return_value += 20
        monitor.pause(14)
        monitor.after_step(2, step(10, away=2), result(1.0))
        clock.return_value += 3
        monitor.after_step(3, step(10, away=4), result(1.0))
    first, second = records(tmp_path)
    assert (first["tokens"], first["seconds"], first["tokens_per_second"]) == (30, 6, 5)
    assert (second["tokens"], second["seconds"], second["tokens_per_second"]) == (15, 3, 5)
    assert (first["away"], second["away"]) == (1.5, 4)


def test_the_clock_begins_with_the_training_not_with_the_monitor(tmp_path, clock):
    with Monitor(tmp_path, steps=1, every=1, main=True) as monitor:
        clock.return_value += 50
        monitor.start(0, None)
        clock.return_value += 3
        monitor.after_step(1, step(10), result(1.0))
    assert records(tmp_path)[0]["seconds"] == 3


def test_a_resumed_run_goes_on_with_the_averages_begun_and_without_later_records(tmp_path, capsys):
    """Saved after step 3; the run was killed in step 5, while it wrote the record of step 4."""
    with Monitor(tmp_path, steps=6, every=2, main=True) as monitor:
        monitor.start(0, None)
        for number in (1, 2, 3):
            monitor.after_step(number, step(10 * number), result(float(number)))
        window = json.loads(json.dumps(monitor.state_dict()))
        monitor.record_dev_loss(3, {"dev_loss": 9.0})
        assert "step 3: dev loss 9.000\n" in capsys.readouterr().err
        monitor.record_save(3, 0.5)
        monitor.after_step(4, step(999), result(999.0))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "dev_')
    with Monitor(tmp_path, steps=6, every=2, main=True) as monitor:
        monitor.start(3, window)
        monitor.after_step(4, step(10), result(7.0))
    assert [record["step"] for record in records(tmp_path)] == [2, 3, 3, 4]
    assert records(tmp_path)[1:3] == [{"step": 3, "dev_loss": 9.0}, {"step": 3, "save_seconds": 0.5}]
    assert records(tmp_path)[-1]["loss"] == pytest.approx((30 * 3 + 10 * 7) / 40)


def test_other_ranks_keep_the_averages_and_write_nothing(tmp_path):
    with Monitor(tmp_path, steps=4, every=2, main=False) as monitor:
        monitor.start(0, None)
        monitor.after_step(1, step(10), result(3.0))
        assert monitor.state_dict()["weight"] == 10 and monitor.state_dict()["loss"] == 30
        monitor.after_step(2, step(10), result(3.0))
        monitor.record_dev_loss(2, {"dev_loss": 1.0})
        assert monitor.state_dict()["weight"] == 0
    assert not list(tmp_path.iterdir())


def test_curves_that_cannot_be_written_end_no_training(tmp_path, capsys):
    with Monitor(tmp_path, steps=3, every=1, main=True) as monitor:
        monitor.start(0, None)
        monitor.after_step(1, step(10), result(1.0))
        full = mock.Mock(add_scalar=mock.Mock(side_effect=OSError(28, "No space left on device")))
        monitor.curves[0]._writer = full
        for number in (2, 3):
            monitor.after_step(number, step(10), result(1.0))
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().err.count("TensorBoard's curves end at step 2: No space left on device") == 1


def test_tensorboard_has_what_the_records_have(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Monitor(tmp_path, steps=2, every=1, main=True) as monitor:
        monitor.start(0, None)
        for number in (1, 2):
            monitor.after_step(number, step(10), result(float(number), grad_norm=None))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)]
    assert {"nll", "learning_rate", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert not {"step", "tokens", "seconds", "grad_norm"} & set(events.Tags()["scalars"])


def test_what_is_said_is_one_line_as_it_is(tmp_path, capsys):
    with Monitor(tmp_path, steps=2, every=1, main=True) as monitor:
        monitor.start(0, None)
        monitor.say(said := f"resuming from [bold]/{'long/' * 40}:smile:")
    assert capsys.readouterr().err == f"{said}\n"
