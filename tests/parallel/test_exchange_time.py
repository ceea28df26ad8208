"""The time of an exchange on a device is between two events of its own, and nothing waits to read them."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from support.small_run import TARGET_TOP2, TOKEN_TOP2, make_recipe

from lsmoe_ds.parallel import collectives
from lsmoe_ds.parallel.collectives import Traffic

CPU = torch.device("cpu")


class Played:
    """A device that is played: work is queued, and done when it is told so. Times are in milliseconds."""

    def __init__(self, done: float = 0.0) -> None:
        self.queued, self.done = 0.0, done

    def event(self, device: torch.device) -> PlayedEvent:
        return PlayedEvent(self)


class PlayedEvent:
    """An event with what is used of those of CUDA."""

    def __init__(self, device: Played) -> None:
        self.device, self.at = device, math.nan

    def record(self) -> None:
        self.at = self.device.queued

    def query(self) -> bool:
        return self.at <= self.device.done

    def elapsed_time(self, end: PlayedEvent) -> float:
        assert self.query() and end.query(), "CUDA raises an error"
        return end.at - self.at


@pytest.fixture
def device():
    played = Played()
    with mock.patch.object(collectives, "make_event", played.event):
        yield played


def exchange(traffic: Traffic, device: Played, milliseconds: float) -> None:
    with traffic.timing(CPU):
        device.queued += milliseconds


def test_the_seconds_are_the_device_s_and_other_work_is_not_in_them(device):
    traffic = Traffic(bytes=8)
    exchange(traffic, device, 30)
    device.queued += 500
    exchange(traffic, device, 12)
    device.done = device.queued
    taken = traffic.take()
    assert taken.seconds == pytest.approx(0.042) and taken.bytes == 8
    assert traffic.take().seconds == 0 and not traffic.pending


def test_what_the_device_has_yet_to_do_is_left_for_the_next_call(device):
    traffic = Traffic()
    for milliseconds in (30, 12, 7):
        exchange(traffic, device, milliseconds)
    device.done = 42
    assert traffic.take().seconds == pytest.approx(0.042)
    assert traffic.take().seconds == 0 and len(traffic.pending) == 1
    device.done = 49
    assert traffic.take().seconds == pytest.approx(0.007)


def test_without_a_device_the_host_s_clock_tells():
    traffic = Traffic()
    with mock.patch.object(collectives.time, "perf_counter", side_effect=[10.0, 10.25]), traffic.timing(CPU):
        pass
    assert traffic.take().seconds == 0.25 and not traffic.pending


def test_events_are_cuda_s_on_cuda_alone():
    with mock.patch.object(torch.cuda, "Event") as made:
        assert collectives.make_event(CPU) is None and not made.called
        assert collectives.make_event(torch.device("cuda:1")) is made.return_value
        made.assert_called_once_with(enable_timing=True)


class Waiting:
    """An exchange that overlaps with what is computed until it is waited for."""

    def __init__(self, work, device: Played) -> None:
        self.work, self.device = work, device

    def wait(self) -> None:
        self.work.wait()
        self.device.queued += 5


def played_step(topology, recipe, vocabulary: int) -> tuple[float, int]:
    """Take a step in which the device waits for each exchange for 5 ms; return what is told, and their
    number.
    """
    import torch.distributed as dist
    from support.sameness import ragged_batch

    from lsmoe_ds.data.batches import Step
    from lsmoe_ds.training.engine import build_engine, train_step

    played, count, true = Played(done=math.inf), 0, dist.all_to_all_single

    def slow(*arguments, **options):
        nonlocal count
        count += 1
        work = true(*arguments, **options)
        if work is None:  # the call itself waits
            played.queued += 5
            return None
        return Waiting(work, played)

    engine = build_engine(recipe, vocabulary, topology)
    generator = torch.Generator().manual_seed(3)
    units = [ragged_batch(generator, recipe, sentences) for sentences in (3, 5)]
    tokens = sum(unit.target_tokens for unit in units)
    step = Step(units[topology.data_rank :: topology.data], tokens, tokens, 8, [])
    with (
        mock.patch.object(collectives, "make_event", played.event),
        mock.patch.object(dist, "all_to_all_single", slow),
    ):
        result = train_step(engine, step, 1, recipe, topology)
    engine.destroy()
    return sum(traffic.seconds for traffic in result.exchanged.values()), count


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_step_tells_the_device_s_time_of_all_ranks(pool, tmp_path, chunks):
    sides = ({**moe, "chunks": chunks} for moe in (TOKEN_TOP2, TARGET_TOP2))
    recipe = make_recipe(tmp_path, *sides, expert=2)
    recipe.data.batch.count = 2  # a micro-batch on each rank
    found = pool.run(2, played_step, recipe, 100, expert=2)
    exchanges = sum(count for _, count in found)
    assert exchanges == 2 * 2 * (1 + 4 * chunks), (
        "counts, and rows forth and back in both passes, of two layers"
    )
    assert [seconds for seconds, _ in found] == pytest.approx([0.005 * exchanges] * 2)
