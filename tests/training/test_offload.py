"""Adam on the host steps as Adam does, in every layout; resumes, is resharded, and is planned."""

from __future__ import annotations

import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch
from support.alternating import alternating
from support.layouts import load_and_save, losses, shapes_in, states
from support.loops import assert_same_end, loop
from support.optimizer_steps import recipe_of, take_steps
from support.short_runs import ShortRuns

from lsmoe_ds.config.deepspeed import read_deepspeed_config
from lsmoe_ds.config.optimizer import Adam
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.planning.memory import memory
from lsmoe_ds.training import offloaded_adam
from lsmoe_ds.training.offloaded_adam import OffloadedAdam
from lsmoe_ds.training.optimizers import BETAS, EPSILON

SHAPES = [(7, 5), (1,), (23,), (4,), (2, 3, 4)]


def steps_of(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Take three steps; the second one without a gradient of the third parameter."""
    generator = torch.Generator().manual_seed(3)
    for number in range(3):
        for i, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if (number, i) == (1, 2) else gradient
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        optimizer.step()


def new_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def assert_steps_are_those_of_torch() -> None:
    settings = {"betas": BETAS, "eps": EPSILON, "weight_decay": 0.1}
    ours, theirs = new_parameters(), new_parameters()
    steps_of(OffloadedAdam([{"params": ours}], lr=0.0, fused=True, **settings), ours)
    steps_of(torch.optim.AdamW([{"params": theirs}], lr=0.0, fused=True, **settings), theirs)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_steps_are_those_of_torch(monkeypatch):
    monkeypatch.setattr(offloaded_adam, "PART", 8)
    assert_steps_are_those_of_torch()


class Copies:
    """A stream that does what it is given only when something waits for it, as late as a device may."""

    def __init__(self, *_: object) -> None:
        self.given: list = []

    def wait_stream(self, other: object) -> None:
        pass

    def record_event(self) -> SimpleNamespace:
        count = len(self.given)
        return SimpleNamespace(synchronize=lambda: self.run(count))

    def run(self, count: int) -> None:
        for number, copy in enumerate(self.given[:count]):
            if copy is not None:
                copy()
                self.given[number] = None

    def synchronize(self) -> None:
        self.run(len(self.given))


def test_copies_are_made_before_they_are_read(monkeypatch):
    """With copies to and from a device that are late, and a stream that keeps their order."""
    stream = Copies()
    current: list[Copies] = []
    true_copy, true_empty, step_copies = torch.Tensor.copy_, torch.empty, OffloadedAdam._step_copies

    @contextlib.contextmanager
    def on(chosen):
        current.append(chosen)
        yield
        current.pop()

    def copy(target, source, non_blocking=False):
        if not (non_blocking and current):
            return true_copy(target, source)
        current[-1].given.append(lambda: true_copy(target, source))
        return target

    monkeypatch.setattr(offloaded_adam, "PART", 8)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: true_empty(*size, **options))
    monkeypatch.setattr(OffloadedAdam, "_is_apart", lambda self, values: True)
    copied = []
    monkeypatch.setattr(
        OffloadedAdam, "_step_copies", lambda *given: (copied.append(1), step_copies(*given))[1]
    )
    assert_steps_are_those_of_torch()
    assert copied and stream.given and not any(stream.given)


def offloaded(recipe: Recipe) -> Recipe:
    recipe.training.adam = Adam(offload=True)
    return recipe


LAYOUTS = [("token", 1, 1, 1, 0), ("token", 2, 1, 2, 1), ("target", 4, 2, 2, 2), ("target", 2, 2, 2, 0)]


@pytest.mark.parametrize(("layout", "half"), alternating(LAYOUTS, [False, True]), ids=str)
def test_a_step_is_that_of_adam_in_every_layout(pool, layout, half):
    routing, world, tensor, expert, stage = layout
    found = []
    for change in (offloaded, lambda recipe: recipe):
        recipe = change(recipe_of(routing, tensor, expert, stage))
        if half:
            recipe.deepspeed = {**recipe.deepspeed, "bf16": {"enabled": True}}
        found.append(pool.run(world, take_steps, recipe, tensor=tensor, expert=expert))
    for (*ours, weights), (*theirs, wanted) in zip(*found, strict=True):
        assert ours[0] == theirs[0] and ours[1] == theirs[1], "rates and settings"
        assert ours[2] == [pytest.approx(each, rel=1e-6) for each in theirs[2]]
        for name, value in wanted.items():
            torch.testing.assert_close(
                torch.from_numpy(weights[name]), torch.from_numpy(value), rtol=1e-5, atol=1e-7, msg=name
            )


# (tensor, expert, world, ZeRO stage)
ONE, EXPERTS, BOTH = (1, 1, 1, 0), (1, 2, 2, 1), (2, 2, 4, 2)
OFFLOAD = {"offload": True}


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    return ShortRuns(pool, tmp_path_factory.mktemp("offload"), loop)


@pytest.mark.parametrize(("layout", "bf16"), [(ONE, False), (EXPERTS, True), (BOTH, False)], ids=str)
def test_an_interrupted_run_ends_bit_equal(runs, tmp_path, layout, bf16):
    recipe = runs.recipe(layout, bf16, adam=OFFLOAD, ema={"decay": 0.5})
    runs.train(recipe, tmp_path / "cut", layout, 5, KeyboardInterrupt())
    runs.train(recipe, tmp_path / "cut", layout)
    assert_same_end(tmp_path / "cut", runs.begun(layout, bf16, adam=OFFLOAD, ema={"decay": 0.5}), 6)


@pytest.mark.parametrize(
    ("before", "after", "settings"), [(EXPERTS, BOTH, OFFLOAD), (BOTH, ONE, None), (ONE, EXPERTS, OFFLOAD)]
)
def test_moments_move_to_the_host_and_back(runs, tmp_path, before, after, settings):
    """Moments of a run are taken over by one with or without offloading, in another layout."""
    given = {"adam": None if settings else OFFLOAD}
    run, (tensor, expert, world, _) = runs.begun(before, steps=3, **given), after
    recipe = runs.recipe(after, adam=settings)
    checkpoint = run / "checkpoints" / "step-3"
    runs.pool.run(world, load_and_save, recipe, checkpoint, tmp_path / "dealt", tensor=tensor, expert=expert)
    shapes = shapes_in(checkpoint)
    wanted, found = states(checkpoint, shapes), states(tmp_path / "dealt/checkpoints/step-3", shapes)
    for name, values in wanted.items():
        kept = values.keys() - {"values"}  # of ZeRO stages 1 and 2 alone
        assert {"exp_avg", "exp_avg_sq"} <= kept <= found[name].keys()
        assert all(torch.equal(values[key], found[name][key]) for key in kept), name
    shutil.copytree(run, tmp_path / "run")
    runs.train(recipe, tmp_path / "run", after)
    assert losses(tmp_path / "run") == pytest.approx(losses(runs.begun(ONE)), rel=1e-5)


@pytest.mark.parametrize(("stage", "precision"), [(0, "float32"), (1, "bfloat16"), (2, "float32")])
def test_the_plan_moves_the_moments(stage, precision):
    plain, moved = (memory(each, 2, stage, precision) for each in (recipe_of(), offloaded(recipe_of())))
    assert moved.host == plain.optimizer - moved.optimizer > 0 == plain.host
    assert moved.host == plain.optimizer * (1 if stage == 0 else 2 / 3)
    assert plain.total - moved.total == moved.host, "which is no part of the rank's own"


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("offload_optimizer", {"device": "cpu"}, "gradients of earlier steps; set 'training.adam.offload: "),
        ("offload_optimizer", {"device": "nvme", "nvme_path": "/tmp"}, "gradients of earlier steps"),
        ("cpu_offload", True, "gradients of earlier steps"),
        ("offload_param", {"device": "cpu"}, "it is for ZeRO stage 3"),
        ("zenflow", {"topk_ratio": 0.1}, "it is not tested with experts"),
    ],
)
def test_offloading_of_deepspeed_is_refused(key, value, why):
    with pytest.raises(ValueError, match=f"'zero_optimization.{key}' is set: remove it there, .*{why}"):
        read_deepspeed_config({"zero_optimization": {"stage": 1, key: value}})


def test_offloading_that_is_off_is_none():
    assert read_deepspeed_config({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}})


def test_settings_of_adam_are_for_adam():
    given = recipe_of().model_dump(mode="json", exclude_none=True)
    given["training"] |= {"optimizer": "adafactor", "adam": {"offload": True}}
    with pytest.raises(ValueError, match="'adam' is given, but 'optimizer' is adafactor: leave it out"):
        Recipe.model_validate(given)
