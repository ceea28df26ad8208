"""The recipe: everything a run depends on, as one YAML file.

This module has its keys, defaults and limits, except those of the text (:mod:`lsmoe_ds.config.data`).
:mod:`lsmoe_ds.config.file` reads the file. The resolved recipe is stored in the run and can be loaded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from lsmoe_ds.config.data import Data
from lsmoe_ds.config.deepspeed import read_deepspeed_config
from lsmoe_ds.config.host import TOKENIZER, count_tokens, end_of
from lsmoe_ds.config.layout import Parallel
from lsmoe_ds.config.method import sections
from lsmoe_ds.config.model import Model
from lsmoe_ds.config.optimizer import OPTIMIZERS, Adafactor, Adam, OptimizerSettings
from lsmoe_ds.config.section import NAME, Fraction, Positive, Section
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted, listed

Schedule = Literal["inverse_square_root", "linear", "cosine"]


class EarlyStopping(Section):
    """End the training when ``patience`` validations in a row have not improved the dev loss, or the chrF of
    the dev translations, by more than ``min_delta``.
    """

    metric: Literal["loss", "chrf"] = "loss"
    patience: Positive
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0


class Ema(Section):
    """Keep an exponential moving average of the weights. The weights after a step count ``decay`` times as
    much as those after the next step.
    """

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999


class Teacher(Section):
    """Learn from the distributions of another ``model``, a run or a converted folder with the same vocabulary
    (Kim and Rush, 2016, section 3.1): the loss is (1 - weight) CE + weight KL(teacher || model).
    """

    model: Path
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5


class Training(Section):
    """Set up the training.

    ``trainable`` names the parameters that are trained: all, those of methods, or those whose global names
    match one of the glob patterns. ``directions`` are the directions of the data that are trained on, by
    default all. ``auxiliary_over`` says over which tokens the methods' auxiliary losses are computed: over a
    whole step, or over each micro-batch of all ranks, whose losses are then averaged.
    """

    renamed: ClassVar[Mapping[str, str]] = {"clip": "max_grad_norm", "patience": "hang_timeout"}

    steps: Positive
    start_from: Path | None = None
    trainable: Literal["all", "methods"] | list[str] = "all"
    directions: Annotated[list[str], Field(min_length=1)] | None = None
    optimizer: Literal["adam", "adafactor"] = "adam"
    adam: Adam | None = None
    adafactor: Adafactor | None = None
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 4000
    schedule: Schedule = "inverse_square_root"
    label_smoothing: Fraction = 0.1
    dropout: Fraction = 0.1
    attention_dropout: Fraction = 0.0
    activation_checkpointing: bool = False
    packed: bool = False
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    teacher: Teacher | None = None
    auxiliary_over: Literal["step", "micro-batch"] = "step"
    ema: Ema | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    log_every: Positive = 20
    log_to: list[Literal["tensorboard", "wandb"]] = Field(default=["tensorboard"])
    peak_flops: Annotated[float, Field(gt=0.0)] | None = None
    validate_every: Annotated[int, Field(ge=0)] = 0
    validate_pairs: Positive | None = None
    validate_translations: Positive | None = None
    early_stopping: EarlyStopping | None = None

    @property
    def stops_by_chrf(self) -> bool:
        return self.early_stopping is not None and self.early_stopping.metric == "chrf"

    checkpoint_every: Positive = 500
    keep: Positive = 2
    keep_best: Annotated[int, Field(ge=0)] = 0
    hang_timeout: Annotated[float, Field(gt=0, le=1e6)] = 900.0
    max_skipped: Annotated[int, Field(ge=0)] = 20
    deterministic: bool = False

    @model_validator(mode="after")
    def _settings_are_of_the_optimizer(self) -> Training:
        for name in OPTIMIZERS:
            if getattr(self, name) is not None and self.optimizer != name:
                raise ValueError(
                    f"'{name}' is given, but 'optimizer' is {self.optimizer}: leave it out, or set "
                    f"'optimizer: {name}'"
                )
        return self

    @property
    def optimizer_settings(self) -> OptimizerSettings:
        given: OptimizerSettings | None = getattr(self, self.optimizer)
        return OPTIMIZERS[self.optimizer]() if given is None else given


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
        """Use the tokenizer of a model of transformers as the vocabulary."""
        model, data = (value.get(key) if isinstance(value, dict) else None for key in ("model", "data"))
        folder = model.get("huggingface") if isinstance(model, dict) else getattr(model, "huggingface", None)
        if not isinstance(folder, str | Path) or not isinstance(data, dict):
            return value
        file = Path(folder) / TOKENIZER
        if not file.is_file():
            return value  # the check of the model reports this
        known = {"size": count_tokens(file), "type": "tokenizer"}
        given = data.get("vocabulary") or {}
        for key, found in known.items():
            if isinstance(given, dict) and given.get(key, found) != found:
                raise ValueError(
                    f"'data.vocabulary.{key}' is {given[key]}, but that of 'model.huggingface' is {found}: "
                    "leave 'data.vocabulary' out"
                )
        changed = {**data, "vocabulary": {**known, "file": str(file)}}
        task = model.get("task", "translate") if isinstance(model, dict) else getattr(model, "task", None)
        if task != "translate":
            return {**value, "data": changed}
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
        if hidden.task != self.data.task:
            raise ValueError(
                f"'model.task' is {hidden.task}, but 'data.corpora' are text to {self.data.task}: they must "
                "be the same"
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
        self._fits_replicas()
        self._fits_teacher()
        self._fits_optimizer()
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
        self._fits_validation()
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

    def _fits_replicas(self) -> None:
        """Raise ValueError for replicas of tasks that the recipe does not have."""
        for name, side in (("encoder", self.model.encoder), ("decoder", self.model.decoder)):
            if side.moe is not None and side.moe.replicas != "auto":
                try:
                    side.moe.replicated(self.languages)
                except UserError as error:
                    raise ValueError(f"'model.{name}.moe.replicas': {error}") from None

    def _fits_teacher(self) -> None:
        """Raise ValueError for models that cannot learn from a teacher."""
        if self.training.teacher is None:
            return
        if self.model.huggingface is not None:
            raise ValueError(
                "'training.teacher' is not for models of 'model.huggingface': train on its translations "
                "(`lsmoe translate --corpus`)"
            )
        if self.model.distills:
            raise ValueError(
                "'training.teacher' gives the model a second teacher: it already learns from its specific "
                "route, so leave one out"
            )

    def _fits_optimizer(self) -> None:
        """Raise ValueError for a DeepSpeed configuration under which the optimizer cannot step."""
        config = self.deepspeed if isinstance(self.deepspeed, dict) else {}
        stage, name = config.get("zero_optimization", {}).get("stage", 0), self.training.optimizer
        settings = self.training.optimizer_settings
        if stage not in settings.stages:
            raise ValueError(
                f"'training.optimizer' is {name}, which needs whole matrices, but 'deepspeed' asks for ZeRO "
                f"stage {stage}, which updates flat slices of them: set 'deepspeed' to "
                "ds_configs/zero0.json or ds_configs/bf16_zero0.json"
            )
        if settings.steps_halves and config.get("fp16", {}).get("enabled"):
            raise ValueError(
                f"'training.optimizer' is {name}, which steps weights in float32 and bfloat16, but "
                "'deepspeed' enables 'fp16': enable 'bf16', or neither"
            )

    def _fits_validation(self) -> None:
        """Raise ValueError for settings that need a measurement that no validation makes."""
        training = self.training
        if training.early_stopping is not None and not training.validate_every:
            raise ValueError(
                "'training.early_stopping' counts validations, but 'training.validate_every' is 0: set it to "
                "the steps between them"
            )
        if training.keep_best and not training.validate_every:
            raise ValueError(
                f"'training.keep_best' is {training.keep_best}, but without validations no checkpoint is the "
                "best: set 'training.validate_every' to the steps between them"
            )
        if training.validate_translations is not None and not training.validate_every:
            raise ValueError(
                "'training.validate_translations' is of validations, but 'training.validate_every' is 0: set "
                "it to the steps between them"
            )
        if training.validate_translations is not None and self.model.huggingface is not None:
            raise ValueError(
                "'training.validate_translations' is not for models of 'model.huggingface': leave it out"
            )
        if training.stops_by_chrf and training.validate_translations is None:
            raise ValueError(
                "'training.early_stopping.metric' is chrf, but nothing is translated: set "
                "'training.validate_translations' to the dev pairs of each direction to translate"
            )

    def _fits_host(self) -> None:
        """Raise ValueError for settings that a model of transformers does not support."""
        from lsmoe_ds.config.host_outline import read_outline  # needs transformers and torch

        if self.parallel.tensor > 1 or self.parallel.expert > 1:
            raise ValueError(
                f"'parallel.tensor' is {self.parallel.tensor} and 'parallel.expert' {self.parallel.expert}, "
                "but a model of 'model.huggingface' is whole on each rank: leave both at 1"
            )
        if self.training.packed:
            raise ValueError(
                "'training.packed' is not for models of 'model.huggingface', which read padded sentences: "
                "leave it out"
            )
        assert self.model.huggingface is not None
        try:
            window = read_outline(self.model.huggingface, self.model.task, self.data.labels or ()).window
        except UserError as error:
            raise ValueError(f"'model.huggingface' is {self.model.huggingface}: {error}") from None
        longest = min(self.data.batch.tokens, 2 * self.data.batch.max_length)
        if self.model.task != "translate":
            self._fits_labels(window)
        elif window is not None and longest > window:
            raise ValueError(
                f"'data.batch.max_length' {self.data.batch.max_length} allows prompts with answers of "
                f"{longest} tokens, more than the {window} that the model reads: set it to at most "
                f"{window // 2}"
            )

    def _fits_labels(self, window: int | None) -> None:
        """Raise ValueError for settings that an encoder does not support."""
        longest, smoothing = self.data.batch.max_length, self.training.label_smoothing
        if window is not None and longest > window:
            raise ValueError(
                f"'data.batch.max_length' is {longest}, more than the {window} tokens that the model reads: "
                "set it to at most that"
            )
        if self.model.task == "answer" and smoothing:
            raise ValueError(
                f"'training.label_smoothing' is {smoothing}, but the places of an answer are not smoothed: "
                "set it to 0"
            )

    @property
    def languages(self) -> Languages:
        return Languages(tuple(map(Direction.parse, self.data.directions)), self.data.groups.listed)

    @property
    def trained(self) -> tuple[Direction, ...]:
        """List the directions that are trained, in the order of all directions."""
        chosen = self.training.directions
        return tuple(d for d in self.languages.directions if chosen is None or str(d) in chosen)

    @property
    def data_name(self) -> str:
        """Return the name of the prepared data, which several recipes may share."""
        return self.data.name or self.name

    @property
    def prepared(self) -> Path:
        """Return the folder of the prepared data of this recipe."""
        return self.data.directory / "prepared" / self.data_name

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True
        )
