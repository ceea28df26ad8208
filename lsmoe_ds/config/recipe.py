"""The recipe: everything a run depends on, as one YAML file.

These are its keys, defaults and limits, but for those of the text (:mod:`lsmoe_ds.config.data`);
:mod:`lsmoe_ds.config.file` reads the file. The resolved recipe is stored in the run
and can be loaded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, create_model, field_validator, model_validator

from lsmoe_ds.config.data import Data
from lsmoe_ds.config.deepspeed import read_deepspeed_config
from lsmoe_ds.config.host import TOKENIZER, count_tokens, end_of
from lsmoe_ds.config.method import MethodSection, sections
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.section import NAME, Fraction, Positive, Section
from lsmoe_ds.config.shapes import LinearShape, shapes_of
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import Direction, Languages
from lsmoe_ds.notices import counted, listed

PRESETS: dict[str, dict[str, Any]] = {
    "transformer-tiny": {"hidden": 256, "heads": 4, "encoder": (3, 1024), "decoder": (2, 1024)},
    "transformer-small": {"hidden": 512, "heads": 8, "encoder": (6, 1024), "decoder": (6, 1024)},
    "transformer-base": {"hidden": 512, "heads": 8, "encoder": (6, 2048), "decoder": (6, 2048)},
    "transformer-big": {"hidden": 1024, "heads": 16, "encoder": (6, 4096), "decoder": (6, 4096)},
}


class Side(Section):
    """Encoder or decoder. ``feed_forward`` is one width, or one for each layer (as in an extracted
    sub-network).
    """

    layers: Annotated[int, Field(ge=0, le=1000)]
    feed_forward: Positive | list[Positive]
    moe: MoE | None = None

    @model_validator(mode="after")
    def _widths(self) -> Side:
        if isinstance(self.feed_forward, list) and len(self.feed_forward) != self.layers:
            widths, layers = counted(len(self.feed_forward), "width"), counted(self.layers, "layer")
            raise ValueError(f"'feed_forward' lists {widths} for {layers}")
        if self.moe is not None and self.moe.every > self.layers:
            layers = counted(self.layers, "layer")
            raise ValueError(
                f"'moe.every' is {self.moe.every}, more than the {layers}: none would have experts"
            )
        return self

    def width(self, layer: int) -> int:
        """Return the width F of the feed-forward of a layer counted from 0."""
        return self.feed_forward[layer] if isinstance(self.feed_forward, list) else self.feed_forward

    def is_moe(self, layer: int) -> bool:
        """Return whether a layer counted from 0 holds experts: with ``every: 2`` the second, fourth, ..."""
        return self.moe is not None and (layer + 1) % self.moe.every == 0


class _Model(Section):
    """The host, and beside these keys one for each method.

    With ``huggingface`` it is the model that transformers saved in a folder, for a ``task``: its
    configuration gives the other keys, and a side that it does not have has 0 layers.
    """

    huggingface: Path | None = None
    task: Literal["translate"] = "translate"
    preset: Literal["transformer-tiny", "transformer-small", "transformer-base", "transformer-big"] | None = (
        None
    )
    hidden: Positive
    heads: Positive
    encoder: Side
    decoder: Side

    @model_validator(mode="before")
    @classmethod
    def _host(cls, value: Any) -> Any:
        """Fill in what the configuration of a model of transformers says."""
        if not isinstance(value, dict) or not isinstance(value.get("huggingface"), str | Path):
            return value
        from lsmoe_ds.config.host_outline import read_outline  # needs transformers and torch

        if value.get("preset") is not None:
            raise ValueError("'preset' and 'huggingface' are two models: leave one out")
        try:
            host = read_outline(Path(value["huggingface"]), value.get("task", "translate"))
        except UserError as error:
            raise ValueError(f"'huggingface': {error}") from None
        sides = {
            side: {"layers": host.layers.get(side, 0), "feed_forward": host.widths.get(side, 1)}
            for side in ("encoder", "decoder")
        }
        own = {"hidden": host.hidden, "heads": host.heads, **sides}
        for key, found in own.items():
            given = value.get(key, found)
            same = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
            if same != found:
                raise ValueError(
                    f"'{key}' is {given}, but the model in 'huggingface' has {found}: leave it out"
                )
        return {**value, **own}

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("preset"), str)
            or value["preset"] not in PRESETS
        ):
            return value
        preset = PRESETS[value["preset"]]
        value = {"hidden": preset["hidden"], "heads": preset["heads"], **value}
        for side in ("encoder", "decoder"):
            layers, width = preset[side]
            given = value.get(side)
            if given is None or isinstance(given, dict):
                value[side] = {"layers": layers, "feed_forward": width, **(given or {})}
        return value

    @model_validator(mode="after")
    def _heads(self) -> _Model:
        if self.huggingface is not None:
            return self
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            if not side.layers:
                raise ValueError(f"'{name}.layers' is 0: it must be at least 1")
        if self.hidden < 4:
            raise ValueError(
                f"'hidden' is {self.hidden}: it must be at least 4, so that positions have a sine and a "
                "cosine of two lengths"
            )
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(
                f"'hidden' is {self.hidden}: it must be even and a multiple of 'heads', which is {self.heads}"
            )
        return self

    @model_validator(mode="after")
    def _methods(self) -> _Model:
        for method in self.methods:
            if self.huggingface is not None and not method.in_hosts:
                known = [name for name, kind in sections().items() if kind.in_hosts]
                raise ValueError(
                    f"'{method.name}' has no place in a model of transformers, which can have "
                    f"{listed(known)}: leave it out"
                )
            method.checked(self)
        for site in shapes_of(self) if len(self.methods) > 1 else ():
            here = [method.name for method in self.methods if method.is_at(site)]
            if isinstance(site, LinearShape) and len(here) > 1:
                raise ValueError(
                    f"'{here[0]}' and '{here[1]}' both stand beside {site.at}: a linear layer takes one"
                )
        return self

    @property
    def methods(self) -> list[MethodSection]:
        """List the sections of the methods that the model has."""
        found = (getattr(self, name, None) for name in sections())
        return [section for section in found if section is not None]

    @property
    def teaches(self) -> bool:
        """Tell whether experts teach shared feed-forwards."""
        return any(moe.has_shared for _, _, moe in self.moe_layers())

    @property
    def distills(self) -> bool:
        """Whether there are two routes, a specific and a shared one, both of which each batch takes in
        training.
        """
        return self.teaches or any(method.distills for method in self.methods)

    @property
    def needs_groups(self) -> bool:
        """Tell whether a method depends on the resource groups of languages."""
        return any(method.needs_groups for method in self.methods)

    def routed(self, moe: MoE) -> int:
        """Count the routes of training that use these experts: both, unless a shared feed-forward takes the
        second.
        """
        return 2 if self.distills and not moe.has_shared else 1

    @property
    def affine(self) -> MoE | None:
        """The settings that task-affine batches follow: the decoder's if it is routed by task, otherwise the
        encoder's.
        """
        settings = [
            side.moe for side in (self.decoder, self.encoder) if side.moe is not None and side.moe.by_task
        ]
        return settings[0] if settings else None

    def moe_layers(self) -> Iterator[tuple[str, int, MoE]]:
        """Yield (side, layer, settings) of each layer that holds experts."""
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            for layer in range(side.layers):
                if side.moe is not None and side.is_moe(layer):
                    yield name, layer, side.moe


if TYPE_CHECKING:
    Model = _Model
else:
    _sections = {name: (kind | None, None) for name, kind in sections().items()}
    Model = create_model("Model", __base__=_Model, __module__=__name__, **_sections)


class Training(Section):
    """How a model is trained. ``trainable`` are all parameters, those of methods, or those whose global names
    match one of the glob patterns. ``directions`` are those of the data that train, by default all.
    """

    renamed: ClassVar[Mapping[str, str]] = {"clip": "max_grad_norm", "patience": "hang_timeout"}

    steps: Positive
    start_from: Path | None = None
    trainable: Literal["all", "methods"] | list[str] = "all"
    directions: Annotated[list[str], Field(min_length=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 4000
    label_smoothing: Fraction = 0.1
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.0
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    log_every: Positive = 20
    validate_every: Annotated[int, Field(ge=0)] = 0
    validate_pairs: Positive | None = None
    checkpoint_every: Positive = 500
    keep: Positive = 2
    keep_best: Annotated[int, Field(ge=0)] = 0
    hang_timeout: Annotated[float, Field(gt=0, le=1e6)] = 900.0


class Parallel(Section):
    """World = tensor x data; experts are spread over ``expert`` ranks of the world."""

    tensor: Positive = 1
    expert: Positive = 1


class Recipe(Section):
    name: Annotated[str, Field(pattern=NAME)]
    data: Data
    model: Model
    training: Training
    parallel: Parallel = Parallel()
    deepspeed: str | dict[str, Any] = "ds_configs/zero1.json"

    @model_validator(mode="before")
    @classmethod
    def _tokenizer(cls, value: Any) -> Any:
        """Let the tokenizer of a model of transformers be the vocabulary."""
        model, data = (value.get(key) if isinstance(value, dict) else None for key in ("model", "data"))
        folder = model.get("huggingface") if isinstance(model, dict) else getattr(model, "huggingface", None)
        if not isinstance(folder, str | Path) or not isinstance(data, dict):
            return value
        file = Path(folder) / TOKENIZER
        if not file.is_file():
            return value  # the check of the model says so
        known = {"size": count_tokens(file), "type": "tokenizer"}
        given = data.get("vocabulary") or {}
        for key, found in known.items():
            if isinstance(given, dict) and given.get(key, found) != found:
                raise ValueError(
                    f"'data.vocabulary.{key}' is {given[key]}, but that of 'model.huggingface' is {found}: "
                    "leave 'data.vocabulary' out"
                )
        changed = {**data, "vocabulary": {**known, "file": str(file)}}
        prompt = data.get("prompt") or {}
        if isinstance(prompt, dict) and prompt.get("end") is None:
            try:
                prompt = {**prompt, "end": end_of(Path(folder))}
            except UserError as error:
                raise ValueError(str(error)) from None
        return {**value, "data": {**changed, "prompt": prompt}}

    @field_validator("deepspeed")
    @classmethod
    def _read_deepspeed(cls, value: str | dict[str, Any]) -> dict[str, Any]:
        return read_deepspeed_config(value)

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        tensor, expert, hidden = self.parallel.tensor, self.parallel.expert, self.model
        if hidden.huggingface is None and self.data.prompt is not None:
            given = [f"data.prompt.{key}" for key in sorted(self.data.prompt.model_fields_set)]
            raise ValueError(
                f"'{(given or ['data.prompt'])[0]}' is for models of 'model.huggingface': leave it out"
            )
        if hidden.huggingface is not None:
            self._fits_host()
        if hidden.heads % tensor:
            heads = counted(hidden.heads, "head")
            raise ValueError(
                f"'parallel.tensor' is {tensor}, which does not divide the {heads} of 'model.heads'"
            )
        if self.data.vocabulary.size % tensor:
            raise ValueError(
                f"'parallel.tensor' is {tensor}, which does not divide 'data.vocabulary.size' "
                f"{self.data.vocabulary.size}"
            )
        for name, side in (("encoder", hidden.encoder), ("decoder", hidden.decoder)):
            for layer in range(side.layers):
                dense = not side.is_moe(layer) or (side.moe is not None and side.moe.has_shared)
                if dense and side.width(layer) % tensor:
                    raise ValueError(
                        f"'parallel.tensor' is {tensor}, which does not divide the feed-forward width "
                        f"{side.width(layer)} of the {name}"
                    )
        for name, _, moe in hidden.moe_layers():
            if moe.experts % expert:
                experts = counted(moe.experts, "expert")
                raise ValueError(
                    f"'parallel.expert' is {expert}, which does not divide the {experts} of the {name}"
                )
        trains = any(method.trains for method in hidden.methods) or any(hidden.moe_layers())
        if self.training.trainable == "methods" and not trains:
            known = ", ".join(name for name, kind in sections().items() if kind.trains)
            raise ValueError(
                f"'training.trainable' is methods, but 'model' has none that trains: add {known} or the "
                "experts of 'moe', or give all or patterns of global names"
            )
        if wrong := [each for each in self.training.directions or () if each not in self.data.directions]:
            raise ValueError(
                f"'training.directions' names {wrong[0]}, which is not among 'data.directions': "
                f"{listed(self.data.directions)}"
            )
        for method in hidden.methods:
            method.check_languages(self.languages)
            method.check_training(self.training)
        if self.data.batch.languages == "task-affine":
            affine = self.model.affine
            if affine is None:
                raise ValueError(
                    "'data.batch.languages' is task-affine, but neither side has 'routing: task' or 'routing:"
                    " static'"
                )
            if affine.expert_groups % expert:
                raise ValueError(
                    f"'data.batch.languages' is task-affine and 'parallel.expert' is {expert}: "
                    "'moe.expert_groups' must be a multiple of it, so that a task's experts live on one "
                    f"rank; found {affine.expert_groups}"
                )
        return self

    def _fits_host(self) -> None:
        """Raise ValueError for what a model of transformers cannot do."""
        from lsmoe_ds.config.host_outline import read_outline  # needs transformers and torch

        if self.parallel.tensor > 1 or self.parallel.expert > 1:
            raise ValueError(
                f"'parallel.tensor' is {self.parallel.tensor} and 'parallel.expert' {self.parallel.expert}, "
                "but a model of 'model.huggingface' is whole on each rank: leave both at 1"
            )
        assert self.model.huggingface is not None
        window = read_outline(self.model.huggingface, self.model.task).window
        longest = min(self.data.batch.tokens, 2 * self.data.batch.max_length)
        if window is not None and longest > window:
            raise ValueError(
                f"'data.batch.max_length' {self.data.batch.max_length} allows prompts with answers of "
                f"{longest} tokens, more than the {window} that the model reads: set it to at most "
                f"{window // 2}"
            )

    @property
    def languages(self) -> Languages:
        return Languages(tuple(map(Direction.parse, self.data.directions)), self.data.groups.listed)

    @property
    def trained(self) -> tuple[Direction, ...]:
        """List the directions that are trained, in the order of all."""
        chosen = self.training.directions
        return tuple(d for d in self.languages.directions if chosen is None or str(d) in chosen)

    @property
    def data_name(self) -> str:
        """Name the prepared data, which recipes may share."""
        return self.data.name or self.name

    @property
    def prepared(self) -> Path:
        """Say where the prepared data of this recipe lie."""
        return self.data.directory / "prepared" / self.data_name

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
        )
