"""Grow a trained model: more experts, experts in place of dense feed-forwards, more languages, more methods.

Parameters of the trained model keep their values. New ones begin like this:

- an expert is a copy of another expert, or of the dense feed-forward that it replaces; - in a router by task,
old tasks give new experts less weight than any other, so that with K > 1 they choose as
  before; a new task copies the choices of a similar language, or they are drawn at random;
- the tag of a new language copies the embedding of a similar language, or the mean of all tags;
- everything else is initialized as for a new training, where methods at first change no result.

So old directions translate as before, except where a router that reads tokens or sentences has new experts.
H hidden, E experts, L languages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.stored import RECIPE, VOCABULARY, Stored, name_of
from lsmoe_ds.checkpoint.tensors import LazyTensor, Tensors
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import Vocabulary, add_tags
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.base import Method
from lsmoe_ds.model.build import outline
from lsmoe_ds.model.initialization import draw, drawn
from lsmoe_ds.model.methods import check_holders, methods_of, same_methods
from lsmoe_ds.moe.load import assign
from lsmoe_ds.notices import counted, listed, notice
from lsmoe_ds.parallel.parameters import global_names, named_state
from lsmoe_ds.parallel.topology import Topology

EXPERT = re.compile(r"(.+\.feed_forward\.)experts\.(\d+)\.(.+)")
EMBEDDING = "embedding.tokens.weight"


@dataclass(frozen=True)
class Likeness:
    """The parts from which new ones are copied: the number of an expert, and the code of a language.

    If ``expert`` is None, new experts copy the old ones in turn.
    """

    expert: int | None = None
    language: str | None = None


def grown_recipe(stored: Stored, overrides: Sequence[str], out: Path) -> tuple[Recipe, bytes]:
    """Return the recipe of a training that starts from the grown model in ``out``, and its vocabulary with
    the tags of new languages.

    Raises UserError for overrides that remove something, or that growing does not support.
    """
    before, vocabulary = stored.recipe, Vocabulary.load(stored.vocabulary)
    given = {override.partition("=")[0].strip() for override in overrides}
    whole = {"size": vocabulary.size, "type": vocabulary.type, "file": str(stored.vocabulary)}
    anew: dict[str, Any] = {
        "name": name_of(out),
        "data": {"name": None, "vocabulary": whole},  # its prepared data get their own name
        "training": {"start_from": str(out)},  # some methods require a training that starts from a model
    }
    if not any(key.startswith("training.directions") for key in given):
        anew["training"]["directions"] = None
    if "data.languages" in given and "data.directions" not in given:
        anew["data"]["directions"] = []  # those of the trained model cover only its languages
    if "data.directions" in given and "data.languages" not in given:
        anew["data"]["languages"] = []  # those of the trained model may lack new ones
    after = load_recipe(stored.home / RECIPE, overrides, anew)
    if gone := sorted(set(before.languages.codes) - set(after.languages.codes)):
        raise UserError(
            f"the grown recipe lacks the language {gone[0]}, which the model has: languages can be added, not"
            " taken away"
        )
    known, new = (each.languages.directions for each in (before, after))
    if anew["data"].get("directions") == [] and set(known) - set(new):  # new: those with English
        count = len(before.languages.codes)
        kept = list(dict.fromkeys(map(str, (*known, *new))))
        anew["data"]["directions"] = "all" if len(known) == count * (count - 1) else kept
        after = load_recipe(stored.home / RECIPE, overrides, anew)
    if after.data.tags != before.data.tags:
        raise UserError(
            f"'data.tags' is {after.data.tags}, but the model reads {before.data.tags}: a grown model keeps "
            "its tags"
        )
    check_holders(before, after)
    for section, old in same_methods(before, after):
        section.check_grown(old, before.languages)
    had = {method.name for method in before.model.methods}
    for method in after.model.methods:
        if method.begins and method.name not in had:
            raise UserError(
                f"'model.{method.name}' is found out when a training starts, and cannot be added before: "
                "give it to the recipe of the training that starts from the grown model"
            )
    model = stored.vocabulary.read_bytes()
    if after.model.huggingface is None:  # a model of transformers reads none of our tags
        model = add_tags(model, [code for code in after.languages.codes if code not in vocabulary.codes])
        anew["data"]["vocabulary"] |= {"size": Vocabulary(model).size, "file": str(out / VOCABULARY)}
    return load_recipe(stored.home / RECIPE, overrides, anew), model


def grow(
    weights: Mapping[str, Tensor], before: Recipe, after: Recipe, vocabulary: Vocabulary, like: Likeness
) -> Tensors:
    """Return the tensors of the grown model, by global name, each computed on demand.

    ``vocabulary`` is that of the trained model. Raises UserError if the recipes differ in something that
    cannot be grown.
    """
    old, state = Tensors.of(weights), _state(after)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    grown = _Grown(old, before, after, vocabulary, like, state)
    for name in old:
        at, _, rest = name.rpartition("feed_forward.")
        if name not in shapes and f"{at}feed_forward.experts.0.{rest}" not in shapes:
            raise UserError(
                f"the grown model has no place for {name}: nothing that the model has can be taken away"
            )
    return Tensors({name: grown.entry(name, shape) for name, shape in shapes.items()})


def _state(recipe: Recipe) -> dict[str, Tensor]:
    """Return parameters and buffers of a recipe's model, without values (meta device), by global name."""
    model = outline(recipe, recipe.data.vocabulary.size)
    names = global_names(model, Topology.single())
    return {names[name]: value for name, value in named_state(model)}


class _Grown:
    def __init__(
        self,
        weights: Tensors,
        before: Recipe,
        after: Recipe,
        vocabulary: Vocabulary,
        like: Likeness,
        state: Mapping[str, Tensor],
    ) -> None:
        self.state = state
        self.weights, self.before, self.after, self.vocabulary = weights, before, after, vocabulary
        self.old, self.new = before.languages, after.languages
        self.methods = methods_of(after, Topology.single())
        self.like = like if like.language is None else replace(like, language=self.old.own(like.language))
        for side, _, moe in before.model.moe_layers():
            self._check_tasks(
                side, moe, (after.model.encoder if side == "encoder" else after.model.decoder).moe
            )
        for side, layer, moe in after.model.moe_layers():
            if f"{side}.{layer}.feed_forward.expand.weight" in weights and moe.top_k == 1:
                raise UserError(
                    f"experts in the place of the {side}'s dense feed-forwards need 'top_k' of 2 or more: "
                    f"with 1 the output is multiplied by a probability, about 1 / {moe.experts} at first"
                )

    def _check_tasks(self, side: str, old: MoE, new: MoE | None) -> None:
        """Raise UserError if old tasks would be assigned to other experts."""
        if new is None or (old.routing, old.task, old.expert_groups) != (
            new.routing,
            new.task,
            new.expert_groups,
        ):
            raise UserError(
                f"the {side} of the model has other experts: 'routing', 'task' and 'expert_groups' must stay "
                "as they are"
            )
        if new.experts < old.experts:
            raise UserError(
                f"the {side} has {counted(old.experts, 'expert')}: they can be more, not {new.experts}"
            )
        tasks = self.old.tasks(old.task), self.new.tasks(old.task)
        if old.expert_groups > 1 and (old.experts != new.experts or tasks[0] != tasks[1]):
            raise UserError(
                f"the experts of the {side} stand in groups, to which tasks would be assigned anew: nothing "
                "can be added"
            )
        if old.routing != "static":
            return
        assigned = [
            dict(zip(which.tasks(old.task), assign(moe, which), strict=True))
            for moe, which in ((old, self.old), (new, self.new))
        ]
        if moved := [task for task, experts in assigned[0].items() if assigned[1].get(task) != experts]:
            raise UserError(
                f"static routing would assign other experts of the {side} to the task {moved[0]}, which has "
                "its own already"
            )

    def entry(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """Return the entry of the grown model's tensor of this name."""
        if name == EMBEDDING:
            return LazyTensor(shape, lambda: self._embedding(shape))
        if found := EXPERT.fullmatch(name):
            return self._same(name, shape, self._expert(found[1], int(found[2]), found[3]))
        if name.endswith((".router.weight", ".router.bias")):
            return LazyTensor(shape, lambda: self._router(name, shape))
        if ".feed_forward.shared." in name and name not in self.weights:
            return self._same(name, shape, name.replace(".shared.", "."))
        for method in self.methods:
            if method.owns(name):
                return self._of_method(method, name, shape)
        return self._same(name, shape, name)

    def _of_method(self, method: Method, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """Return a method's parameter: with the old rows of languages, or initialized if it is new."""
        if name not in self.weights:
            return drawn(name, self.state[name], self.after.training.seed, self.methods)
        if len(shape) < 2:
            return self._same(name, shape, name)
        before = next(each for each in methods_of(self.before, Topology.single()) if each.name == method.name)
        old, new = (each.language_rows(name, shape[-1]) for each in (before, method))
        if not old:
            return self._same(name, shape, name)
        entry = self.weights.entries[name]
        sources = self._sources(method, old, new)
        return entry._replace(shape=shape, make=lambda: self._by_language(name, shape, old, new, sources))

    def _same(self, name: str, shape: tuple[int, ...], source: str) -> LazyTensor:
        found = self.weights.shape(source) if source in self.weights else None
        if found != shape:
            raise UserError(
                f"{name} should be {shape}, the model has {found or 'none'}: experts, languages and methods "
                "can be added, all else must stay as it is"
            )
        return self.weights.entries[source]

    def _expert(self, at: str, number: int, rest: str) -> str:
        """Return the name of the old tensor from which an expert's tensor is copied."""
        if (name := f"{at}experts.{number}.{rest}") in self.weights:
            return name
        if (dense := f"{at}{rest}") in self.weights:
            return dense
        count = sum(each.startswith(f"{at}experts.") and each.endswith(f".{rest}") for each in self.weights)
        source = number % max(count, 1) if self.like.expert is None else self.like.expert
        if self.like.expert is not None and not 0 <= source < count:
            raise UserError(
                f"there is no expert {source} for new ones to be like: the model has experts 0 to {count - 1}"
            )
        return f"{at}experts.{source}.{rest}"

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return draw(name, list(shape), self.after.training.seed, self.methods).to(self.state[name].dtype)

    def _embedding(self, shape: tuple[int, ...]) -> Tensor:
        """Return the embedding: old rows keep their positions; rows of new tags come last."""
        old = self.weights[EMBEDDING]
        tags = [
            self.vocabulary.tag_id(code)
            for code in ([self.like.language] if self.like.language else self.vocabulary.codes)
        ]
        return torch.cat([old, old[tags].mean(0, keepdim=True).expand(shape[0] - len(old), -1)])

    def _router(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a router's weights [E, H] or bias [E]; for a router by task, its weights [tasks, E]."""
        whole = self._drawn(name, shape)
        if name not in self.weights:
            return whole
        old, settings = (
            self.weights[name],
            (self.after.model.encoder if name.startswith("encoder") else self.after.model.decoder).moe,
        )
        assert settings is not None
        if not settings.by_task:
            whole[: len(old)] = old
            return whole
        before, after = self.old.tasks(settings.task), self.new.tasks(settings.task)
        whole[:, old.shape[1] :] -= 1.0
        for row, task in enumerate(after):
            source = task if task in before else self._task_like(task, before)
            if source is not None:
                known = old[before.index(source)]
                whole[row, : len(known)] = known
                whole[row, len(known) :] = known.min() - 1.0
        return whole

    def _task_like(self, task: str, before: Sequence[str]) -> str | None:
        """Return the old task whose choices a new one copies: the same, with the language to copy from."""
        if self.like.language is None:
            return None
        parts = [part if part in self.old.codes else self.like.language for part in task.split("-")]
        return "-".join(parts) if "-".join(parts) in before else None

    def _sources(self, method: Method, before: dict[str, slice], after: dict[str, slice]) -> dict[str, str]:
        """Map each new holder of rows to the old holder from which it copies them, and report this."""
        sources = {}
        for new in after.keys() - before.keys():
            if (found := method.holder_like(new, list(before), self.like.language)) is not None:
                sources[new] = found
        if taken := listed(f"{new} that of {old}" for new, old in sorted(sources.items())):
            fresh = sorted(after.keys() - before.keys() - sources.keys())
            rest = f"; {listed(fresh)} as in a new training" if fresh else ""
            notice(f"{method.name}: each new one begins as another is: {taken}{rest}")
        return sources

    def _by_language(
        self,
        name: str,
        shape: tuple[int, ...],
        before: dict[str, slice],
        after: dict[str, slice],
        sources: Mapping[str, str],
    ) -> Tensor:
        old, whole = self.weights[name], self._drawn(name, shape)
        for code, rows in before.items():
            if code not in after or after[code].stop - after[code].start != rows.stop - rows.start:
                size = counted(rows.stop - rows.start, "row")
                raise UserError(f"the matrices of {name} for {code} have {size}, which cannot change")
            whole[after[code]] = old[rows]
        for new, code in sources.items():
            whole[after[new]] = old[before[code]]
        return whole
