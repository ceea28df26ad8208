"""How long the watchdog lets all ranks be quiet, by a clock of looks in place of seconds."""

from __future__ import annotations

from unittest import mock

import pytest

from lsmoe_ds.launch import watchdog


class Left(Exception):
    """The process would have ended."""


class Looks:
    """The event that ends a watch, waited for before each look; ``script`` has its progress."""

    def __init__(self, script: list[bool]) -> None:
        self.script, self.seen = script, 0

    def wait(self, poll: float) -> bool:
        if self.seen == len(self.script):
            return True
        watchdog._Progress.of_all += self.script[self.seen]
        self.seen += 1
        return False


@pytest.fixture(autouse=True)
def _alone():
    """Leave nothing behind: neither a count of progress nor a dump of stacks that is still to come."""
    with (
        mock.patch.object(watchdog._Progress, "of_all", 0),
        mock.patch.object(watchdog.faulthandler, "dump_traceback_later"),
    ):
        yield


def looks_until_it_leaves(script: list[bool], timeout: float, poll: float) -> int | None:
    """Return after how many looks the process ends; None if it does not."""
    looks = Looks(script)
    with mock.patch.object(watchdog, "_leave", side_effect=Left):
        try:
            watchdog._look(None, None, timeout, poll, looks)
        except Left:
            return looks.seen
    return None


def test_heartbeats_that_are_less_than_the_timeout_apart_keep_it_alive():
    seven_tenths = [True, *[False] * 6]
    assert looks_until_it_leaves(seven_tenths * 5, timeout=10, poll=1) is None


def test_it_leaves_after_the_timeout_since_the_last_heartbeat_and_not_before():
    assert looks_until_it_leaves([True] + [False] * 9, timeout=10, poll=1) is None
    assert looks_until_it_leaves([True] + [False] * 20, timeout=10, poll=1) == 11
    assert looks_until_it_leaves([False] * 6 + [True] + [False] * 20, timeout=10, poll=1) == 17
    assert looks_until_it_leaves([True] + [False] * 20, timeout=2.5, poll=0.5) == 6


def test_pythons_own_dump_of_stacks_comes_after_that_and_is_put_off_by_every_look():
    script = [True, False, True, False]
    looks_until_it_leaves(script, timeout=10, poll=1)
    later = watchdog.faulthandler.dump_traceback_later
    assert [call.args for call in later.call_args_list] == [(12,)] * len(script)
