"""Rows in chunks: which exchanges begin before what is computed, on ranks with and without rows."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from support.gradients import static, step_of
from support.sameness import VOCABULARY

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.planning.plan import plan

EXPERTS = 2


class Noted:
    """An exchange that notes when it is waited for."""

    def __init__(self, work: Any, number: int, events: list[str]) -> None:
        self.work, self.number, self.events = work, number, events

    def wait(self) -> None:
        self.events.append(f"end {self.number}")
        self.work.wait()


def events_of(topology: Any, recipe: Recipe, training: bool) -> tuple[list[str], list[int], int]:
    """Return what happens in a forward and, in ``training``, a backward pass: exchanges that overlap
    (``begin`` and ``end``), other exchanges, and experts (in the backward pass ``-experts``). Also the rows
    that the experts compute at a time, and the bytes sent.
    """
    import torch.distributed as dist

    from lsmoe_ds.model.initialization import initialize
    from lsmoe_ds.model.transformer import Transformer
    from lsmoe_ds.moe.experts import Experts

    events: list[str] = []
    rows: list[int] = []
    true, true_forward = dist.all_to_all_single, Experts.forward
    numbers = iter(range(100))

    def exchange(*arguments: Any, **options: Any) -> Any:
        if not options.get("async_op"):
            events.append("exchange")
            return true(*arguments, **options)
        number = next(numbers)
        events.append(f"begin {number}")
        return Noted(true(*arguments, **options), number, events)

    def forward(self: Experts, given: Any, *arguments: Any, **options: Any) -> Any:
        events.append("experts")
        rows.append(len(given))
        out = true_forward(self, given, *arguments, **options)
        if out.requires_grad:
            out.register_hook(lambda gradient: events.append("-experts"))
        return out

    model = Transformer(recipe, VOCABULARY, topology).train(training)
    initialize(model, 1, topology)
    batch = step_of(recipe, topology.data_rank, topology.data).batches[0]
    with (
        mock.patch.object(dist, "all_to_all_single", exchange),
        mock.patch.object(Experts, "forward", forward),
    ):
        losses = model(*batch.inputs)
        if training:
            losses.loss.backward()
    sent = sum(layer.deepspeed_moe.traffic.bytes for _, layer in model.moe_layers())
    return events, rows, sent


def one_layer(chunks: int) -> Recipe:
    """Make a recipe whose decoder has one layer with experts, and the encoder none."""
    recipe = static(EXPERTS, 0, chunks)
    recipe.model.encoder.moe = None
    recipe.model.decoder.moe = recipe.model.decoder.moe.model_copy(update={"every": 2})
    return recipe


# Two chunks: forward, there (0, 1) and back (2, 3); backward, the same ways, the last chunk first.
FORWARD = "exchange; begin 0; begin 1; end 0; experts; begin 2; end 1; experts; begin 3; end 2; end 3"
BACKWARD = "begin 4; begin 5; end 4; -experts; begin 6; end 5; -experts; begin 7; end 6; end 7"


def test_a_chunk_travels_while_another_is_computed_in_both_passes(pool):
    """All four ranks begin and end the same exchanges in the same order, two of them without rows."""
    found = pool.run(4, events_of, one_layer(2), True, expert=EXPERTS)
    for events, _, _ in found:
        assert "; ".join(events) == f"{FORWARD}; {BACKWARD}"
    rows = [rows for _, rows, _ in found]
    assert [sum(each) for each in rows][1:3] == [0, 0], "whose experts no token chooses"
    for first, second in (rows[0], rows[3]):
        assert first >= second > first - 3, "equal parts of the rows of each of two ranks"


def test_one_chunk_is_exchanged_as_a_whole(pool):
    for events, _, _ in pool.run(4, events_of, one_layer(1), True, expert=EXPERTS):
        assert events == ["exchange", "exchange", "experts", "exchange", "exchange", "-experts", "exchange"]


@pytest.mark.parametrize("chunks", [1, 2])
def test_evaluation_has_one_chunk(pool, chunks):
    for events, _, _ in pool.run(4, events_of, one_layer(chunks), False, expert=EXPERTS):
        assert events == ["exchange", "exchange", "experts", "exchange"]


def test_chunks_add_only_counts_to_what_is_sent(pool):
    one, three = (
        sum(sent for _, _, sent in pool.run(4, events_of, one_layer(chunks), True, expert=EXPERTS))
        for chunks in (1, 3)
    )
    planned = [plan(one_layer(chunks), 4).exchanges[0].count_bytes for chunks in (1, 3)]
    assert three - one == 4 * (planned[1] - planned[0]) == 4 * 2 * 16
