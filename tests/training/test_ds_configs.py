"""Every DeepSpeed configuration that comes with the project trains, and gives what the plain one gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError
from support import PROJECT
from support.sameness import VOCABULARY, recipe_for, steps_of

from lsmoe_ds.config.deepspeed import KEYS
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.engine import engine_config

CONFIGS = sorted(path.name for path in (PROJECT / "ds_configs").glob("*.json"))


def losses(topology, recipe):
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    steps = steps_of(recipe, topology.data_rank, topology.data)
    results = [train_step(engine, step, i + 1, recipe, topology) for i, step in enumerate(steps)]
    dtype = str(next(engine.module.parameters()).dtype)
    engine.destroy()
    return [result.loss for result in results], dtype


def with_config(name: str, expert: int = 1) -> Recipe:
    recipe = recipe_for("mixed", 1, expert, 1)
    return Recipe.model_validate({**recipe.model_dump(exclude_none=True), "deepspeed": f"ds_configs/{name}"})


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_on_two_ranks(pool, name):
    (wanted, _), *_ = pool.run(1, losses, with_config("zero0.json"))
    (found, dtype), (other, _) = pool.run(2, losses, with_config(name, expert=2), expert=2)
    assert found == other
    assert ("bfloat16" in dtype) == name.startswith("bf16")
    assert found == pytest.approx(wanted, rel=2e-2 if name.startswith("bf16") else 1e-5)
    assert found[-1] < found[0]


def test_the_named_kinds_are_there():
    assert {"zero0.json", "zero1.json", "zero2.json", "bf16_zero1.json", "bf16_zero2.json"} <= set(CONFIGS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "asks for ZeRO stage 3: 0, 1 and 2 are supported"),
        (
            {"gradient_clipping": 1.0},
            "sets 'gradient_clipping', which the recipe decides by training.max_grad_norm",
        ),
        ({"train_batch_size": 8}, "sets 'train_batch_size', which the recipe decides by data.batch"),
        (
            {"activation_checkpointing": {"cpu_checkpointing": True}},
            "sets 'activation_checkpointing', which the recipe decides by training.activation_checkpointing",
        ),
        (
            {"wall_clock_breakdown": True},
            "sets 'wall_clock_breakdown', whose timers DeepSpeed cannot run here",
        ),
        (
            {"flops_profiler": {"enabled": True}},
            "sets 'flops_profiler', whose timers DeepSpeed cannot run here",
        ),
    ],
)
def test_what_contradicts_the_recipe_is_refused(config, message):
    value = recipe_for("mixed", 1, 1, 1).model_dump(mode="json") | {"deepspeed": config}
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(value)


def test_what_the_machine_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)  # some processors do
    recipe = recipe_for("mixed", 1, 1, 1).model_copy(update={"deepspeed": {"fp16": {"enabled": True}}})
    with pytest.raises(UserError, match="enables 'fp16', in which this machine's CPU cannot train: enable"):
        engine_config(recipe, Topology())


class Asked(dict):
    """Notes the keys that it is asked for, in ``of[at]``."""

    def __init__(self, of: dict[str, set[str]], at: str = "", **values: Any) -> None:
        super().__init__(values)
        self.of, self.at = of, at

    def __copy__(self) -> Asked:
        return Asked(self.of, self.at, **self)

    def __contains__(self, key: Any) -> bool:
        self.of.setdefault(self.at, set()).add(key)
        return super().__contains__(key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if key in self else self.__missing__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key, default) if key in self else default

    def keys(self) -> Any:
        return self


def test_the_known_keys_are_those_that_deepspeed_reads():
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig}
    models |= {"bf16": precision_config.DeepSpeedBF16Config, "fp16": precision_config.DeepSpeedFP16Config}
    of: dict[str, set[str]] = {}
    silent = {section: Asked(of, section) for section in KEYS.keys() - models.keys() - {""}}
    config.DeepSpeedConfig(Asked(of, train_batch_size=1, **silent))
    fields = {section: model.model_fields.items() for section, model in models.items()}
    read = {section: frozenset(f.alias or name for name, f in each) for section, each in fields.items()}
    read |= {section: frozenset(keys) for section, keys in of.items()}
    read[""] -= config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() | {"bfloat16"}  # an old name of bf16
    assert read == KEYS


def refused(topology, recipe):
    from lsmoe_ds.training.engine import build_engine

    try:
        build_engine(recipe, VOCABULARY, topology)
    except UserError as error:
        return str(error)


def test_a_value_that_deepspeed_refuses_is_one_sentence(pool):
    config = {"tensorboard": {"enabled": "perhaps"}}
    recipe = recipe_for("mixed", 1, 1, 1).model_copy(update={"deepspeed": config})
    (said,) = pool.run(1, refused, recipe)
    assert said.startswith("the DeepSpeed configuration has 'perhaps' for 'tensorboard.enabled': ")
