"""Steps made ahead in a thread: the same steps, the position of the last one used, errors, the end."""

import threading

import pytest

from lsmoe_ds.data.batches import Step
from lsmoe_ds.data.prefetching import AHEAD, Prefetched
from lsmoe_ds.errors import UserError


class Counted:
    """A stream whose n-th step has n sentences, and which may fail."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.made, self.fails_at, self.error = 0, fails_at, error
        self.enough = threading.Event()

    def __next__(self) -> Step:
        if self.made == self.fails_at:
            assert self.error is not None
            raise self.error
        self.made += 1
        if self.made > AHEAD:
            self.enough.set()
        return Step([], 0, 0, self.made, [])

    def state_dict(self) -> dict:
        return {"made": self.made}


def test_steps_come_in_order_with_the_position_of_the_last_one_used():
    stream = Counted()
    with Prefetched(stream) as steps:
        assert steps.state_dict() == {"made": 0}
        assert stream.enough.wait(60)  # what is made ahead is not in the position
        for number in range(1, 20):
            assert next(steps).sentences == number
            assert steps.state_dict() == {"made": number}
    assert 19 <= stream.made <= 19 + AHEAD + 1


def test_a_resumed_stream_begins_at_its_position():
    stream = Counted()
    next(stream)
    with Prefetched(stream) as steps:
        assert steps.state_dict() == {"made": 1}
        assert next(steps).sentences == 2


@pytest.mark.parametrize("error", (UserError("no such text"), KeyboardInterrupt()))
def test_an_error_is_raised_at_its_step(error):
    with Prefetched(Counted(2, error)) as steps:
        assert [next(steps).sentences, next(steps).sentences] == [1, 2]
        with pytest.raises(type(error)) as raised:
            next(steps)
    assert raised.value is error


def test_the_thread_ends_with_the_context_also_after_an_error():
    before = threading.active_count()
    with Prefetched(Counted()) as steps:
        next(steps)
    with pytest.raises(ZeroDivisionError), Prefetched(Counted()):
        raise ZeroDivisionError
    assert threading.active_count() == before
