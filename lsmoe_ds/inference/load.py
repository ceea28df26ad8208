"""Load a model for use in one process, whatever the layout in which it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.stored import READABLE, Weights, find_model, read_weights
from lsmoe_ds.checkpoint.tensors import Tensors
from lsmoe_ds.config.method import shared_route_keys
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Batch, Form, PairBatch, SequenceBatch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.prompts import Prompts
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference.beam_search import Hypothesis, Search, beam_search, never_generated
from lsmoe_ds.inference.sampling import Sampling, sample
from lsmoe_ds.methods.context import Route
from lsmoe_ds.model.base import Model
from lsmoe_ds.model.build import buffers_of, outline
from lsmoe_ds.model.feed_forward import FeedForward
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.notices import notice
from lsmoe_ds.parallel.parameters import LOCAL_EXPERT, global_names, named_state
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.costs import Parts

WHOLE = ("sparse", "consolidated")  # kinds that hold the parameters of all languages


@dataclass(frozen=True)
class Loaded:
    """A model ready to translate. ``kind`` is that of :class:`lsmoe_ds.checkpoint.stored.Stored`;
    ``home`` is the run or converted folder that it belongs to; ``route`` is the route of its sentences."""

    model: Model
    recipe: Recipe
    vocabulary: Vocabulary
    languages: Languages
    step: int
    kind: str
    home: Path
    route: Route = "specific"

    @property
    def device(self) -> torch.device:
        return self.model.topology.device

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def search(
        self, sources: Sequence[Sequence[int]], direction: Direction, search: Search
    ) -> list[list[Hypothesis]]:
        """Find the best translations of token sequences, see :class:`lsmoe_ds.inference.engine.Engine`."""
        form, batch = self._batch(sources, None, direction)
        if isinstance(batch, SequenceBatch):
            assert isinstance(form, Prompts)
            return self._generate(batch, [len(source) for source in sources], int(form.end[0]), search)
        assert isinstance(batch, PairBatch) and isinstance(self.model, Transformer)
        banned = never_generated(self.vocabulary)
        asked = self.model, batch.source, batch.ids, banned
        if isinstance(search, Sampling):
            return [[each] for each in sample(*asked, search, self.route, batch.decoder_input)]
        return beam_search(*asked, search, self.route, batch.decoder_input)

    def collate(
        self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None, direction: Direction
    ) -> Batch:
        """Make a batch of token sequences in one direction, trained or not; without ``targets`` for
        translation.
        """
        return self._batch(sources, targets, direction)[1]

    def _batch(
        self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None, direction: Direction
    ) -> tuple[Form, Batch]:
        languages = with_direction(self.recipe, self.kind, direction)
        form = form_of(self.recipe.data, languages, self.vocabulary)
        batch = form.collate(sources, targets, [languages.direction_id(direction)] * len(sources))
        if (other := stand_in(self.recipe, direction)) is not None:
            batch.direction.fill_(self.languages.direction_id(other))
        return form, batch.to(self.device)

    def _generate(
        self, batch: SequenceBatch, lengths: Sequence[int], end: int, search: Search
    ) -> list[list[Hypothesis]]:
        from lsmoe_ds.inference.generate import generate
        from lsmoe_ds.model.host import HostModel  # needs transformers

        assert isinstance(self.model, HostModel)
        write = partial(self.model.generate, batch, self.route)
        return generate(write, batch, lengths, end, search, self.model.outline.window)

    def logits_of(self, batch: Batch) -> torch.Tensor:
        """Return teacher-forced logits [B, T, V] of a batch, meaningless at padding; or the logits of
        :class:`lsmoe_ds.model.host.LabellingModel`.
        """
        if isinstance(batch, PairBatch):
            assert isinstance(self.model, Transformer)
            return self.model.logits(batch.source, batch.decoder_input, batch.ids, self.route)
        from lsmoe_ds.model.host import HostModel, LabellingModel  # needs transformers

        assert isinstance(batch, SequenceBatch)
        if isinstance(self.model, LabellingModel):
            return self.model.logits(batch.tokens, batch.real, batch.ids, self.route)
        assert isinstance(self.model, HostModel)
        return self.model.logits(batch.tokens, batch.ids, self.route)


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    route: str = "specific",
    average: Averaging = 1,
    streamed: bool = False,
) -> Loaded:
    """Load a run folder (its newest checkpoint), a checkpoint in it, or a converted folder, in float32 and
    evaluation mode.

    ``device`` defaults to the GPU if there is one. ``route`` "shared" uses only parameters that all languages
    share. ``average`` chooses the weights of a run. With ``streamed``, experts are read from the files for
    each call. Raises UserError for a path that is none of these, is damaged, or was converted for another
    engine, and for a route or an average that the model lacks.
    """
    stored = find_model(path)
    if stored.kind not in READABLE:
        raise UserError(
            f"{path} was made by `lsmoe convert --as {stored.kind}`, which is not read back here: give the "
            "run or a folder made with --as dense"
        )
    chosen = check_route(route, stored.recipe)
    vocabulary = Vocabulary.load(stored.vocabulary)
    device = (
        torch.device(device)
        if device is not None
        else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    weights = read_weights(stored, average)
    model = build_model(stored.recipe, vocabulary.size, weights, device, streamed)
    return Loaded(
        model,
        stored.recipe,
        vocabulary,
        stored.recipe.languages,
        weights.step,
        stored.kind,
        stored.home,
        chosen,
    )


def with_direction(recipe: Recipe, kind: str, direction: Direction) -> Languages:
    """Return the ids of a model's directions and of ``direction``, which may be untrained (zero-shot).

    Prints on standard error whose parameters an untrained direction uses. Raises UserError as
    :func:`check_direction`.
    """
    languages = recipe.languages
    if direction in languages.directions:
        return languages
    if (other := check_direction(recipe, kind, direction)) is not None:
        notice(f"{direction} was never trained: what each direction has of its own is that of {other}")
    return Languages((*languages.directions, direction))


def known_direction(recipe: Recipe, kind: str, direction: Direction) -> Direction:
    """Return a direction, trained or not (zero-shot), in the codes of a recipe.

    Prints on standard error whose parameters an untrained direction uses. Raises UserError as
    :func:`check_direction`.
    """
    languages = recipe.languages
    own = Direction(languages.own(direction.source), languages.own(direction.target))
    if own in languages.directions or recipe.model.task != "translate":
        return languages.find(own)
    if own.alone:
        raise UserError(f"both languages are {own.source}: name two different ones")
    with_direction(recipe, kind, own)
    return own


def check_direction(recipe: Recipe, kind: str, direction: Direction) -> Direction | None:
    """Return the trained direction whose parameters an untrained ``direction`` uses; None if it needs none.

    Raises UserError for languages that the model does not know, for an untrained direction of a model of one
    direction, and where :func:`find_part` does.
    """
    recipe.languages.id(direction.source), recipe.languages.id(direction.target)
    if kind not in WHOLE:
        recipe.languages.direction_id(direction)  # raises
    return find_part(recipe, direction)


def find_part(recipe: Recipe, direction: Direction) -> Direction | None:
    """Do the same as :func:`check_direction` for a model with the parameters of all languages.

    Raises UserError for an untrained direction if layers choose experts by the pair of languages, and where
    :func:`stand_in` does.
    """
    by_pair = any(moe.by_task and moe.task == "pair" for _, _, moe in recipe.model.moe_layers())
    if by_pair and direction not in recipe.languages.directions:
        raise UserError(
            f"direction {direction} is not in this system: it was never trained, and layers choose their "
            "experts by the pair of languages"
        )
    return stand_in(recipe, direction)


def stand_in(recipe: Recipe, direction: Direction) -> Direction | None:
    """Return the trained direction whose parameters methods use for an untrained one; None if they need none.

    Raises UserError if no direction fits all methods.
    """
    languages = recipe.languages
    if direction in languages.directions:
        return None
    found: dict[Direction, str] = {}
    for method in recipe.model.methods:
        try:
            if (other := method.stand_in(direction, languages)) is not None:
                found[other] = method.name
        except ValueError as error:
            raise UserError(f"{direction} was never trained, and 'model.{method.name}': {error}") from None
    if len(found) > 1:
        ways = " and ".join(f"that of {other} for 'model.{name}'" for other, name in found.items())
        raise UserError(
            f"{direction} was never trained, and its methods would take their parts from two directions: "
            f"{ways}"
        )
    return next(iter(found), None)


def check_route(route: str, recipe: Recipe) -> Route:
    """Return the route; raise UserError if a model of this recipe has no such route."""
    if route == "specific" or any(method.takes(route) for method in recipe.model.methods):
        return route
    if route != "shared":
        own = [each for method in recipe.model.methods for each in method.own_routes]
        known = ["specific", *(own or ["shared"])]
        raise UserError(f"'{route}' is no route: choose {', '.join(known[:-1])} or {known[-1]}")
    if not recipe.model.distills:
        raise UserError(
            "the model has no parameters for the route 'shared': a model gets them by "
            f"{' or '.join(f'{key}: true' for key in shared_route_keys())}"
        )
    return "shared"


def build_model(
    recipe: Recipe,
    vocabulary: int,
    weights: Weights,
    device: torch.device,
    streamed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Build the model with these weights, in evaluation mode. If it is ``streamed``, memory holds at most one
    expert. Raises UserError if the weights do not fit the recipe.
    """
    topology, tensors = Topology.single(device), Tensors.of(weights.tensors)
    model = empty_model(recipe, vocabulary, tensors, topology)
    names = global_names(model, topology)
    if streamed:
        names = stream_experts(model, names, tensors)
        model.load_state_dict({local: tensors[name] for local, name in names.items()}, False, assign=True)
    else:
        model.adopt({local: tensors[name] for local, name in names.items()})
    _make_buffers(model, recipe, vocabulary)
    if not streamed:
        model.to(device, dtype)
    model.eval().requires_grad_(False)
    model.pack()
    return model


def stream_experts(model: Model, names: Mapping[str, str], tensors: Tensors) -> dict[str, str]:
    """Make each expert, which has no weights yet, read them before each call and drop them after it.

    ``names`` maps local to global names. Returns those of all other parameters and buffers.
    """
    left = dict(names)
    for at, module in model.named_modules():
        if not LOCAL_EXPERT.search(f"{at}.") or not isinstance(module, FeedForward):
            continue
        own = {name: left.pop(f"{at}.{name}") for name in module.state_dict()}

        def read(expert: nn.Module, _: object, own: dict[str, str] = own) -> None:
            expert.load_state_dict({name: tensors[stored] for name, stored in own.items()}, assign=True)

        def drop(expert: nn.Module, *_: object) -> None:
            expert.to_empty(device="meta")

        module.register_forward_pre_hook(read)
        module.register_forward_hook(drop)
    return left


def _make_buffers(model: Model, recipe: Recipe, vocabulary: int) -> None:
    """Create the buffers of a model that are not stored, as its modules do."""
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    made = buffers_of(recipe, vocabulary) if left else {}
    for name in left:
        at, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(at), attribute, made[name])


def empty_model(recipe: Recipe, vocabulary: int, tensors: Tensors, topology: Topology) -> Model:
    """Build the model for these weights on the meta device. Raises UserError unless they fit the recipe."""
    wanted_numbers = Parts.of(recipe).whole.total
    if (
        wanted_numbers > 2 * tensors.numbers
    ):  # checked before building layers and experts, of which there may be far too many
        raise UserError(
            f"the weights do not belong to the recipe: it needs {wanted_numbers:,} parameters, there "
            f"are {tensors.numbers:,}"
        )
    model = outline(recipe, vocabulary, topology)  # without drawing weights that are replaced at once
    names = global_names(model, topology)
    shapes = {names[name]: tuple(value.shape) for name, value in named_state(model)}
    for name in sorted(shapes.keys() | tensors.keys()):
        wanted = shapes.get(name)
        found = tensors.shape(name) if name in tensors else None
        if wanted != found:
            raise UserError(
                f"the weights do not belong to the recipe and vocabulary: {name} should be {wanted}, found "
                f"{found}"
            )
    return model
