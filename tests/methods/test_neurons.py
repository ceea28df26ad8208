"""Neuron Specialization against its equations in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.language_layers import LANGUAGES, batches_of, ids_of, ids_zero, same_gradients
from support.sameness import VOCABULARY, recipe_for

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.languages import PAD
from lsmoe_ds.methods.context import LanguageContext
from lsmoe_ds.methods.neurons.method import UnitMask
from lsmoe_ds.methods.neurons.recording import Recorder, observed, record
from lsmoe_ds.methods.neurons.selection import at_random, most_active, relatives
from lsmoe_ds.methods.neurons.settings import Neurons
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology

HIDDEN, UNITS, LENGTH = 6, 10, 4
NUMBERS = [0, 3, 3, 5, 2, 0]
DIRECTIONS = len(LANGUAGES.directions)


def equation_1(counts: list[int], share: float) -> set[int]:
    """Add the unit of the highest frequency until the sum reaches the share of all."""
    if share == 100:
        return set(range(len(counts)))
    left, chosen = list(enumerate(counts)), set()
    while 100 * sum(counts[i] for i in chosen) < share * sum(counts):
        best = max(left, key=lambda pair: (pair[1], -pair[0]))
        left.remove(best)
        chosen.add(best[0])
    return chosen


@pytest.mark.parametrize("share", [0, 10, 50, 80, 95, 99.9, 100])
def test_selection_follows_equation_1(share):
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 9, (20, 31), generator=generator)  # with ties and zeros
    counts[3] = 0
    for mask, row in zip(most_active(counts, share), counts.tolist(), strict=True):
        assert set(mask.nonzero().flatten().tolist()) == equation_1(row, share)


def test_random_masks_keep_their_part_of_each_direction():
    mask = at_random(12, 50, 0.7, torch.Generator().manual_seed(1))
    assert (mask.sum(1) == 35).all()
    assert len({tuple(row) for row in mask.tolist()}) == 12


@pytest.mark.parametrize(("units", "part", "kept"), [(9, 0.3, 3), (9, 0.4, 4), (9, 0.9, 8), (9, 0.01, 1)])
def test_random_masks_keep_the_nearest_number_and_at_least_one_unit(units, part, kept):
    mask = at_random(5, units, part, torch.Generator().manual_seed(1))
    assert mask.sum(1).tolist() == [kept] * 5


def test_a_direction_without_text_takes_the_mask_of_its_target():
    directions = [Direction.parse(each) for each in ("en-de", "de-en", "en-fr", "fr-de", "fr-en", "de-fr")]
    known = [True, True, True, False, True, False]
    assert relatives(directions, known, {}) == {3: 0, 5: 2}
    assert relatives(directions, known, {3: 4, 1: 0}) == {3: 4, 1: 0, 5: 2}
    with pytest.raises(KeyError):
        relatives(directions, [False, True, True, True, True, True], {0: 0})
    with pytest.raises(KeyError):
        relatives(directions[:2], [False, True], {})


def masked(remove: str) -> tuple[FeedForward, UnitMask]:
    torch.manual_seed(1)
    network = FeedForward(HIDDEN, UNITS, Topology.single())
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    mask = UnitMask(DIRECTIONS, UNITS, remove, Topology.single())
    mask.mask.copy_(at_random(DIRECTIONS, UNITS, 0.5, torch.Generator().manual_seed(2)))
    network.within.append(mask)
    return network, mask


@pytest.mark.parametrize("remove", ["units", "rows"])
def test_equation_3(remove):
    network, masks = masked(remove)
    ids, x = ids_of(NUMBERS), torch.randn(len(NUMBERS), LENGTH, HIDDEN, requires_grad=True)

    def equation():
        rows = []
        for sentence, direction in enumerate(NUMBERS):
            m = masks.mask[direction].float()
            weight, bias = m[:, None] * network.expand.weight, network.expand.bias
            hidden = F.linear(x[sentence], weight, m * bias if remove == "units" else bias)
            rows.append(network.contract(F.relu(hidden)))
        return torch.stack(rows)

    variables = [x, *network.parameters()]
    same_gradients(lambda: network(x, LanguageContext(ids)), equation, variables)
    mixed = network(x, LanguageContext(ids))
    for sentence, direction in enumerate(NUMBERS):
        alone = network(x[sentence : sentence + 1], LanguageContext(ids_of([direction])))
        torch.testing.assert_close(mixed[sentence], alone[0])


def model_of(recipe: Recipe) -> Transformer:
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith(("expand.bias", "contract.bias")):
            parameter.data.normal_(0.0, 0.5, generator=generator)
    return model


def counted_one_by_one(model: Transformer, batches: list[Batch], per: str) -> dict[str, torch.Tensor]:
    """Activations of each unit, sentence by sentence without any padding."""
    found: dict[str, torch.Tensor] = {}
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(at: str):
        return lambda module, given, out: seen.setdefault(at, []).append((out > 0).flatten(0, -2))

    hooks = [
        module.register_forward_hook(
            keep(f"{name.replace('.deepspeed_moe.experts.deepspeed_', '.')[:-7]}.units")
        )
        for name, module in model.named_modules()
        if name.endswith(".expand")
    ]
    for batch in batches:
        for i in range(len(batch.source)):
            seen.clear()
            source, decoder_input = batch.source[i], batch.decoder_input[i]
            one = batch.ids.select(torch.tensor([i]))
            model.logits(source[source != PAD][None], decoder_input[decoder_input != PAD][None], one)
            for at, parts in seen.items():
                active = torch.cat(parts)
                row = found.setdefault(at, torch.zeros(DIRECTIONS, active.shape[1], dtype=torch.int64))
                row[batch.direction[i]] += active.any(0) if per == "sentence" else active.sum(0)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("per", ["sentence", "token"])
def test_recording_counts_what_is_active_and_no_padding(per):
    recipe = recipe_for("token", 1, 1, 0)  # every second layer has experts
    model, batches = model_of(recipe).eval(), batches_of(recipe)
    filler = replace(batches[0], labels=torch.full_like(batches[0].labels, PAD))
    wanted = counted_one_by_one(model, batches, per)
    recorder = Recorder(model, DIRECTIONS, per, torch.device("cpu"))
    with observed(recorder, experts=True):
        for batch in (*batches, filler):
            recorder.read(batch)
    assert recorder.counts.keys() >= wanted.keys() and len(wanted) > 2
    for at, counts in recorder.counts.items():
        assert torch.equal(counts, wanted.get(at, torch.zeros_like(counts))), at
    numbers = torch.cat([batch.direction for batch in batches])
    assert torch.equal(recorder.sentences, torch.bincount(numbers, minlength=DIRECTIONS))
    assert not any(getattr(module, "observer", None) for module in model.modules())


def recorded(topology, recipe: Recipe, batches: list[Batch], per: str):
    recipe.training.dropout = 0.5  # recording must turn it off
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    model.train()
    own = batches[topology.data_rank :: topology.data]
    counts, sentences = record(model, own, DIRECTIONS, per, topology)
    assert model.training
    return {at: each.numpy() for at, each in counts.items()}, sentences.numpy()


@pytest.mark.parametrize("per", ["sentence", "token"])
@pytest.mark.parametrize(("world", "tensor", "expert"), [(2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_ranks_record_what_one_process_records(pool, world, tensor, expert, per):
    recipe = recipe_for("lms", tensor, expert, 0)
    batches = batches_of(recipe, 4)
    ((wanted, sentences),) = pool.run(1, recorded, recipe_for("lms", 1, 1, 0), batches, per)
    for counts, read in pool.run(world, recorded, recipe, batches, per, tensor=tensor, expert=expert):
        assert (read == sentences).all()
        assert counts.keys() == wanted.keys()
        for at, each in wanted.items():
            assert (counts[at] == each).all(), at


@pytest.mark.parametrize("part", [0.5, 0.01])
@pytest.mark.parametrize("remove", ["units", "rows"])
def test_the_sub_network_of_a_direction_is_exact_and_has_fewer_units(remove, part):
    recipe = recipe_for("units", 1, 1, 0)
    recipe.model.neurons = Neurons(random=part, remove=remove)
    recipe.model.encoder.moe = recipe.model.decoder.moe = None
    recipe = Recipe.model_validate(recipe.model_dump(exclude_unset=True))
    model = model_of(recipe).double().eval()
    if part == 0.01:
        for name, value in model.named_buffers():
            if name.endswith("neurons.mask"):
                value.zero_()
    names = global_names(model, Topology.single())
    weights = {names[name]: value for name, value in model.state_dict().items()}
    (batch,) = batches_of(recipe, 1)
    for number, direction in enumerate(recipe.languages.directions):
        tensors, dense = extract(weights, recipe, direction)
        ids = batch.ids.select(torch.arange(len(batch.source)))
        ids.direction.fill_(number)
        wanted = model.logits(batch.source, batch.decoder_input, ids)
        alone = Transformer(dense, VOCABULARY).double().eval()
        alone.load_state_dict(dict(tensors))
        found = alone.logits(batch.source, batch.decoder_input, ids_zero(ids))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        widths = [layer.feed_forward.expand.weight.shape[0] for layer in (*alone.encoder, *alone.decoder)]
        assert widths == [12 if part == 0.5 else 1] * 4
        assert list(dense.model.encoder.feed_forward) == widths[:2]


@pytest.mark.parametrize(("share", "told"), [(0.95, True), (0.0, False), (95.0, False)])
def test_a_share_that_looks_like_a_fraction_is_told(share, told):
    texts = list(Neurons(share=share).notices(recipe_for("dense", 1, 1, 0)))
    assert [text.startswith(f"model.neurons.share is {share:g} percent") for text in texts] == [True] * told


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"share": 101}, "share"),
        ({"random": 0.5, "share": 90}, "'share' says how activations choose units"),
        ({"at": "attention"}, "'attention' names no feed-forward without experts"),
        ({"at": "encoder.7"}, r"'encoder\.7' names no feed-forward"),
        ({"like": {"de-fr": "en-fr"}}, "'neurons.like': direction de-fr is not in this system"),
        ({}, "there is no 'training.start_from'"),
    ],
)
def test_what_does_not_fit_is_refused(section, says):
    value = recipe_for("dense", 1, 1, 0).model_dump(exclude_unset=True)
    value["model"]["neurons"] = section
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate(value)
