"""A model that learns from the distributions of a teacher."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from support import sameness
from support.commands import main
from support.sameness import VOCABULARY, close, recipe_for, whole
from support.small_run import TOKEN_TOP2, make_recipe, make_run

from lsmoe_ds.checkpoint.run_folder import open_run
from lsmoe_ds.config.recipe import Recipe, Teacher
from lsmoe_ds.errors import UserError
from lsmoe_ds.methods.taught import Taught
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.training.teacher import check_teacher, load_teacher

WEIGHT = 0.3


def taught(routing: str, tensor: int, expert: int, stage: int = 1) -> Recipe:
    recipe = recipe_for(routing, tensor, expert, stage)
    recipe.training.teacher = Teacher(model="none", weight=WEIGHT)
    return recipe


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_that_of_the_equation(smoothing, weight):
    torch.manual_seed(1)
    logits, said = torch.randn(7, 13, dtype=torch.float64), torch.randn(7, 13, dtype=torch.float64) * 2
    labels = torch.randint(0, 13, (7,))
    plain = logits.clone().requires_grad_()
    ce = F.cross_entropy(plain, labels, label_smoothing=smoothing, reduction="sum")
    q = said.softmax(-1)
    kl = (q * (q.log() - plain.log_softmax(-1))).sum()
    wanted = (1 - weight) * ce + weight * kl
    wanted.backward()
    objective = Taught(weight)
    objective.teacher = lambda *_: said.float()
    own = logits.float().requires_grad_()
    objective.see(labels, labels, None, labels)
    found = objective.losses(own * 1.0, labels, smoothing, Topology.single())
    total = found.loss + found.further["distillation"]
    torch.testing.assert_close(total, wanted.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.further["distillation"], (weight * kl).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.nll, F.cross_entropy(logits, labels, reduction="sum").float(), rtol=1e-5, atol=1e-5
    )
    found.loss.backward()
    torch.testing.assert_close(own.grad, plain.grad.float(), rtol=1e-5, atol=1e-6)


def with_teacher(topology, recipe: Recipe):
    """Train a model that learns from a random teacher; return what :func:`support.sameness.train` returns."""
    from lsmoe_ds.model.initialization import initialize
    from lsmoe_ds.model.transformer import Transformer
    from lsmoe_ds.parallel.layers import project
    from lsmoe_ds.training import engine

    teacher = Transformer(recipe_for("token", 1, 1, 1), VOCABULARY).eval().requires_grad_(False)
    initialize(teacher, 9, Topology.single())

    def logits(source, decoder_input, ids, index):
        hidden, _ = teacher.states(source, decoder_input, ids)
        return 3 * project(hidden.flatten(0, 1)[index], teacher.embedding.tokens, teacher.topology)

    true = engine.build_engine

    def build(*arguments):
        made = true(*arguments)
        made.module.objective.teacher = logits
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "build_engine", build)
        return sameness.train(topology, recipe)


LAYOUTS = [("target", 2, 1, 1, 2), ("target", 2, 2, 1, 1), ("target", 2, 1, 2, 1), ("target", 4, 2, 2, 1)]
LAYOUTS += [("dense", 2, 1, 1, 2), ("dense", 2, 2, 1, 1)]


@pytest.mark.parametrize(("routing", "world", "tensor", "expert", "stage"), LAYOUTS)
def test_any_layout_computes_what_one_process_does(pool, routing, world, tensor, expert, stage):
    wanted = pool.run(1, with_teacher, taught(routing, 1, 1))
    found = pool.run(
        world, with_teacher, taught(routing, tensor, expert, stage), tensor=tensor, expert=expert
    )
    plain = pool.run(1, sameness.train, recipe_for(routing, 1, 1, 1))
    for (loss, nll, *others), (own_loss, own_nll, *own), (other, *_) in zip(
        wanted[0][0], found[0][0], plain[0][0], strict=True
    ):
        assert (own_loss, own_nll, *own) == pytest.approx((loss, nll, *others), rel=1e-5, abs=1e-6)
        assert own_loss != pytest.approx(other, rel=1e-2), "or the teacher taught nothing"
    for which in (1, 2):
        first, second = whole(wanted, 1, which), whole(found, tensor, which)
        assert first.keys() == second.keys()
        for name in first:
            close(second[name], first[name], name)


def loop(topology, recipe: Recipe, run) -> None:
    from lsmoe_ds.training.loop import train

    train(recipe, run, topology)


@pytest.fixture(scope="module")
def teacher(pool, tmp_path_factory):
    return make_run(pool, tmp_path_factory.mktemp("taught"), TOKEN_TOP2, TOKEN_TOP2, 2, expert=2)[0]


def student(teacher, steps: int, **more) -> Recipe:
    value = make_recipe(teacher.parent, None, None).model_dump(mode="json", exclude_none=True)
    value["training"] |= {"steps": steps, "checkpoint_every": 1, "log_every": 1, "dropout": 0.0, **more}
    value["training"]["teacher"] = {"model": str(teacher), "weight": WEIGHT}
    return Recipe.model_validate(value)


def records(run) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_a_training_learns_from_a_run_and_resumes(pool, teacher, tmp_path):
    vocabulary = teacher / "vocabulary.model"
    for folder, steps in ((tmp_path / "run", (2, 4)), (tmp_path / "whole", (4,))):
        for until in steps:
            open_run(student(teacher, until), folder, vocabulary)
            pool.run(1, loop, student(teacher, until), folder)
    own, undisturbed = records(tmp_path / "run"), records(tmp_path / "whole")
    assert len(own) == len(undisturbed) == 4
    for record, other in zip(own, undisturbed, strict=True):
        assert record["loss"] == other["loss"] and record["distillation"] == other["distillation"] > 0
        assert math.isfinite(record["distillation"])
    assert own[-1]["distillation"] < own[0]["distillation"]


def test_a_student_keeps_to_its_teachers_checkpoint(pool, teacher, tmp_path):
    """If the teacher trains on, the student still learns from the weights with which it began, or is
    refused.
    """
    model = tmp_path / "teacher"

    def learn(name: str, until: int, taught: bool = True) -> None:
        recipe = student(teacher, until, keep=9)
        recipe.training.teacher = Teacher(model=model, weight=WEIGHT) if taught else None
        vocabulary = recipe.prepared / "vocabulary.model"
        check_teacher(recipe, vocabulary, tmp_path / name)
        open_run(recipe, tmp_path / name, vocabulary)
        pool.run(1, loop, recipe, tmp_path / name)

    learn("teacher", 1, taught=False)
    learn("whole", 3)
    learn("run", 1)
    learn("teacher", 3, taught=False)
    learn("run", 2)
    learn("new", 1)
    first = model / "checkpoints" / "step-1"
    first.rename(tmp_path / "step-1")
    with pytest.raises(UserError, match=r"teacher: it has other weights than those from which .*run has lea"):
        learn("run", 3)
    (tmp_path / "step-1").rename(first)
    learn("run", 3)
    own, whole, new = (records(tmp_path / name) for name in ("run", "whole", "new"))
    assert [line["distillation"] for line in own] == [line["distillation"] for line in whole]
    assert new[0]["distillation"] != own[0]["distillation"]


def test_the_teacher_of_a_run_says_what_its_model_says(teacher):
    from lsmoe_ds.data.batching import BatchStream
    from lsmoe_ds.data.prepared import PreparedData
    from lsmoe_ds.inference.load import load
    from lsmoe_ds.languages import PAD

    recipe = student(teacher, 1)
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"directions": ["fr-en", "en-de"]})}
    )
    data = PreparedData.of(student(teacher, 1))
    stream = BatchStream(data, recipe.languages, data.vocabulary, recipe.data.batch, 1.0, 1)
    batch = next(iter(stream)).batches[0]
    index = (batch.labels.reshape(-1) != PAD).nonzero().squeeze(1)
    say = load_teacher(recipe, data.vocabulary.size, Topology.single())
    with torch.no_grad():
        found = say(batch.source, batch.decoder_input, batch.ids, index)
        loaded = load(teacher, "cpu")
        own = torch.tensor([loaded.languages.direction_id(d) for d in recipe.languages.directions])
        batch.direction.copy_(own[batch.direction])
        codes = torch.tensor([loaded.languages.id(code) for code in recipe.languages.codes])
        for ids in (batch.ids.source, batch.ids.target):
            ids.copy_(codes[ids])
        wanted = loaded.model.logits(batch.source, batch.decoder_input, batch.ids).flatten(0, 1)[index]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.teacher.model": "nowhere"}, "'training.teacher.model' is nowhere: there is no folder"),
        ({"data.tags": "source-target"}, "its 'data.tags' is target"),
        ({"training.teacher.weight": 0}, "should be more than 0.0, found 0"),
        ({"training.teacher.weight": 1.5}, "should be at most 1.0, found 1.5"),
        (
            {"model.low_rank": {"rank": 2, "fuse_distillation": True}},
            "'training.teacher' gives the model a second teacher",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(teacher, tmp_path, capsys, change, message):
    path = tmp_path / "student.yaml"
    path.write_text(student(teacher, 2).to_yaml())
    options = [word for key, value in change.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", str(path), "--out", str(tmp_path / "run"), "--nproc", "1", *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_plan_counts_the_teacher(teacher):
    from lsmoe_ds.checkpoint.stored import find_model, read_weights
    from lsmoe_ds.planning.plan import plan

    recipe = student(teacher, 2)
    without = recipe.model_copy(update={"training": recipe.training.model_copy(update={"teacher": None})})
    own, plain = plan(recipe).memory[0], plan(without).memory[0]
    more = own.weights + own.activations - plain.weights - plain.activations
    logits = recipe.data.batch.tokens // 2 * recipe.data.vocabulary.size
    assert more == 4 * (read_weights(find_model(teacher)).parameters + logits)
