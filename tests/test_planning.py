"""A plan's figures against models that are really built, extracted, partitioned and trained, and against the
papers.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from test_sameness import ragged_batch, steps_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.moe import MoE
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.languages import EOS, Direction
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.model.transformer import Transformer
from lsmoe_ds.moe.costs import bytes_per_row, rows_at_home, rows_at_random
from lsmoe_ds.parallel.parameters import global_names
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.costs import Parts, flops
from lsmoe_ds.planning.plan import in_bytes, plan
from lsmoe_ds.shipped import ROOT as PROJECT

VOCABULARY = 96
PAPERS = PROJECT / "recipes" / "papers"
ROUTINGS = {
    "dense": None,
    "token": {"routing": "token"},
    "sentence": {"routing": "sentence"},
    "target": {"routing": "task", "task": "target"},
    "source": {"routing": "task", "task": "source", "top_k": 1},
    "pair": {"routing": "task", "task": "pair", "top_k": 3},
    "static": {"routing": "static", "task": "pair"},
}
SIDES = [(name, name) for name in ROUTINGS] + [("token", "target"), ("pair", "dense"), ("static", "sentence")]


def recipe_of(
    encoder: str, decoder: str, tensor: int = 1, expert: int = 1, stage: int = 1, bf16: bool = False, **more
) -> Recipe:
    def moe(name: str) -> dict | None:
        return (
            None
            if ROUTINGS[name] is None
            else {"experts": 4, "every": 2, "top_k": 2, **ROUTINGS[name], **more}
        )

    return Recipe.model_validate(
        {
            "name": "small",
            "data": {
                "corpora": ["none"],
                "languages": ["de", "fr", "ru"],
                "vocabulary": {"size": VOCABULARY},
                "batch": {"tokens": 64, "count": 8},
            },
            "model": {
                "hidden": 16,
                "heads": 4,
                "encoder": {"layers": 3, "feed_forward": [24, 20, 12], "moe": moe(encoder)},
                "decoder": {"layers": 4, "feed_forward": [8, 24, 16, 28], "moe": moe(decoder)},
            },
            "training": {"steps": 3, "dropout": 0.0, "max_grad_norm": 0.0},
            "parallel": {"tensor": tensor, "expert": expert},
            "deepspeed": {
                "zero_optimization": {"stage": stage},
                **({"bf16": {"enabled": True}} if bf16 else {}),
            },
        }
    )


def sizes(weights) -> dict[str, int]:
    """Parameters by part, from (name, tensor)."""
    found = {"vocabulary": 0, "encoder": 0, "decoder": 0, "output": 0, "total": 0}
    for name, value in weights:
        part = name.split(".")[0].removesuffix("_norm").replace("embedding", "vocabulary")
        found[part] += value.numel()
        found["total"] += value.numel()
    return found


@pytest.mark.parametrize("sides", [*SIDES, None])
def test_parameters_are_those_of_a_built_model(sides):
    recipe = recipe_of(*sides) if sides else load_recipe(PAPERS / "wmt-base-32.yaml")
    with torch.device("meta"):
        model = Transformer(recipe, recipe.data.vocabulary.size)
    assert plan(recipe).parameters.to_dict() == sizes(model.named_parameters())


@pytest.mark.parametrize("routing", ["target", "source", "pair", "static"])
def test_one_direction_served_is_what_is_extracted(routing):
    recipe = recipe_of(routing, "target")
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    names = global_names(model, Topology.single())
    weights = {names[name]: parameter.detach() for name, parameter in model.named_parameters()}
    dense, changed = extract(weights, recipe, Direction("en", "de"))
    assert plan(recipe).serving.to_dict() == sizes(dense.items()) == plan(changed).parameters.to_dict()


@pytest.mark.parametrize("routing", ["dense", "token", "sentence"])
def test_a_side_that_chooses_when_it_is_there_is_served_whole(routing):
    planned = plan(recipe_of(routing, "pair"))
    assert planned.serving.encoder == planned.parameters.encoder
    assert planned.serving.decoder.total < planned.parameters.decoder.total


@pytest.mark.parametrize(
    ("experts", "top_k", "ranks", "groups"),
    [(8, 2, 4, 1), (8, 3, 2, 1), (8, 2, 8, 2), (12, 2, 3, 2), (4, 1, 1, 1)],
)
def test_rows_that_leave_counted_one_by_one(experts, top_k, ranks, groups):
    away = []
    for own, group in itertools.product(range(ranks), range(groups)):
        members = [expert for expert in range(experts) if expert * groups // experts == group]
        for chosen in itertools.combinations(members, top_k):
            away.append(len({expert * ranks // experts for expert in chosen} - {own}))
    assert rows_at_random(experts, top_k, ranks, groups) == pytest.approx(sum(away) / len(away))


def moe(**settings) -> MoE:
    return MoE.model_validate({"experts": 8, "routing": "task", **settings})


def test_rows_at_home():
    affine = moe(expert_groups=4)
    assert rows_at_home(affine, affine, 4, 1) == rows_at_home(affine, affine, 2, 1) == 0
    assert rows_at_home(moe(expert_groups=4, routing="static"), affine, 4, 1) == 0
    for other in (moe(expert_groups=2), moe(expert_groups=4, task="source"), moe(routing="token")):
        assert rows_at_home(other, affine, 4, 1) is None
    assert rows_at_home(affine, affine, 8, 1) is None  # a task's experts live on two ranks
    assert rows_at_home(affine, affine, 2, 2) == 0.5  # of two tensor-parallel peers one holds them
    assert rows_at_home(affine, affine, 4, 2) == 0.5
    assert rows_at_home(affine, None, 4, 1) is None


def test_bytes_per_row():
    assert bytes_per_row(512, 2, 4, training=False) == 2 * 512 * 4 + 2 * 2 * 4
    assert bytes_per_row(512, 2, 2, training=True) == 4 * 512 * 2 + 4 * 2 * 4


def traffic(topology, recipe):
    """Rows and bytes that left this rank in forward and backward of one micro-batch, by MoE layer in
    order.
    """
    model = Transformer(recipe, VOCABULARY, topology)
    initialize(model, 1, topology)
    batch = ragged_batch(torch.Generator().manual_seed(topology.rank), recipe, 6)
    losses = model(batch.source, batch.decoder_input, batch.labels, batch.ids)
    losses.loss.backward()
    dispatchers = [module.traffic.take() for module in model.modules() if hasattr(module, "traffic")]
    return [(taken.rows, taken.bytes) for taken in dispatchers]


@pytest.mark.parametrize("routing", ["token", "sentence", "pair", "static"])
def test_bytes_are_those_that_travel(pool, routing):
    recipe = recipe_of(routing, routing, expert=2)
    planned = {each.side: each for each in plan(recipe).exchanges}
    sides = [side for side, _, _ in recipe.model.moe_layers()]
    # What a rank sends back is what it got, so bytes follow from rows over all ranks, not on each.
    for side, ranks in zip(sides, zip(*pool.run(2, traffic, recipe, expert=2), strict=True), strict=True):
        rows, sent = map(sum, zip(*ranks, strict=True))
        assert sent == rows * planned[side].row_bytes + 2 * planned[side].count_bytes
        assert rows


def step_traffic(topology, recipe):
    """Rows and bytes of a step that left any rank."""
    from lsmoe_ds.training.engine import build_engine, train_step

    engine = build_engine(recipe, VOCABULARY, topology)
    result = train_step(engine, steps_of(recipe, topology.data_rank, topology.data)[0], 1, recipe, topology)
    engine.destroy()
    return sum(side.rows for side in result.exchanged.values()), sum(
        side.bytes for side in result.exchanged.values()
    )


@pytest.mark.parametrize("routing", ["token", "target"])
def test_choices_of_several_micro_batches_are_counted_ahead(pool, routing):
    recipe = recipe_of(routing, routing, expert=2, stage=0)
    recipe.data.batch.count = 4  # as steps_of has them
    (rows, sent), _ = pool.run(2, step_traffic, recipe, expert=2)
    training, inference = bytes_per_row(16, 2, 4, True), bytes_per_row(16, 2, 4, False)
    counts = 4 * 3 * 8  # micro-batches x layers x bytes
    if routing == "token":
        assert sent == rows / 2 * (training + inference) + 2 * counts
    else:
        assert sent == rows * training + counts


def test_bytes_of_a_step():
    recipe = recipe_of("target", "target", expert=2, expert_groups=2)
    planned = plan(recipe)
    row = bytes_per_row(16, 2, 4, True)
    counts = 8 * 3 * 8  # micro-batches x layers x bytes
    assert [each.rows for each in planned.exchanges] == [0.5, 0.5]  # a task's experts are here or there
    assert (
        planned.step_bytes == 64 * 8 * 2 * 0.5 * row + counts
    )  # all tokens in the decoder, which has two of the layers
    assert planned.step_bytes_home == counts
    assert plan(recipe_of("token", "token", expert=2)).step_bytes_home is None
    choosing = recipe_of("token", "token", expert=2)
    rows = 2 * rows_at_random(4, 2, 2, 1)  # of a token, through two layers
    assert plan(choosing, 8).step_bytes == round(64 * 8 * rows * row) + counts
    inference = bytes_per_row(16, 2, 4, False)
    assert (
        plan(choosing, 4).step_bytes == round(64 * 8 * rows * (row + inference)) + 2 * counts
    )  # choices are counted ahead
    alone = plan(recipe_of("token", "token"))
    assert (alone.exchanges, alone.step_bytes) == ([], 0)


def flops_by_torch(recipe: Recipe, length: int) -> int:
    """Of three sentences of ``length`` tokens on both sides, at inference."""
    model = Transformer(recipe, VOCABULARY)
    initialize(model, 1, Topology.single())
    generator = torch.Generator().manual_seed(2)
    source, decoder_input = (torch.randint(4, VOCABULARY, (3, length), generator=generator) for _ in range(2))
    decoder_input[:, 0] = EOS
    ids = ragged_batch(generator, recipe, 3).ids
    counted = {
        torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # torch counts addmm alone
    model.eval()
    with (
        FlopCounterMode(display=False, custom_mapping=counted) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        model(source, decoder_input, decoder_input, ids)
    return counter.get_total_flops()


@pytest.mark.parametrize(("encoder", "decoder"), [*SIDES, ("sentence", "token")])
def test_flops_are_those_that_torch_counts(encoder, decoder):
    recipe, length = recipe_of(encoder, decoder), 5
    found = flops(recipe, length)
    # 2 E H of a sentence router are spread over the sentence's tokens, which rounds.
    assert 3 * length * (found.source + found.target) == pytest.approx(
        flops_by_torch(recipe, length), abs=3 * length * 2
    )


def millions(count: float) -> int:
    return round(count / 1e6)


def dense(name: str) -> Recipe:
    return load_recipe(PAPERS / f"{name}.yaml", ["model.encoder.moe=null", "model.decoder.moe=null"])


def task_moe(encoder: str, decoder: str, name: str = "wmt-base-32", top_k: int = 2) -> Recipe:
    overrides = []
    for side, task in (("encoder", encoder), ("decoder", decoder)):
        routing = f"task, task: {task}" if task in ("pair", "target") else task
        experts = 32 if name == "wmt-base-32" else 128
        overrides.append(f"model.{side}.moe={{experts: {experts}, top_k: {top_k}, routing: {routing}}}")
    return load_recipe(PAPERS / f"{name}.yaml", overrides)


def paper_total(parts: Parts) -> int:
    """The paper has three matrices of the vocabulary ("33M" and "Softmax 65M") where the model here ties them
    to one.
    """
    return parts.whole.total + 2 * parts.vocabulary.total


def test_beyond_distillation_dense():
    base, big = plan(dense("wmt-base-32")).parameters, plan(dense("web-big-128")).parameters
    assert [
        millions(n)
        for n in (base.vocabulary.total, base.encoder.total, base.decoder.total, paper_total(base))
    ] == [33, 19, 25, 142]
    # The paper's "65M" is cut off, not rounded: two matrices of 64,000 x 512 are 65.5M.
    assert 2 * base.vocabulary.total == 65_536_000
    assert [millions(n) for n in (big.encoder.total, big.decoder.total)] == [126, 151]
    # "473M": three matrices of 64,000 x 1024 bring 473.6M, cut off.
    assert paper_total(big) == pytest.approx(473.6e6, abs=0.1e6)


TABLE_7 = [  # encoder, decoder, and the parameters at inference: encoder, decoder, total
    ("token", "token", 214, 221, 533),
    ("sentence", "sentence", 214, 221, 533),
    ("pair", "pair", 25, 32, 155),
    ("target", "target", 25, 32, 155),
]


@pytest.mark.parametrize(("encoder", "decoder", "wanted_encoder", "wanted_decoder", "total"), TABLE_7)
def test_beyond_distillation_table_7(encoder, decoder, wanted_encoder, wanted_decoder, total):
    planned = plan(task_moe(encoder, decoder))
    # Trained: 214M and 221M in every row. Task routers are smaller than token routers, by less than 0.1M.
    assert millions(planned.parameters.encoder.total) == 214
    assert planned.parameters.decoder.total == pytest.approx(220.55e6, abs=0.06e6)
    assert millions(paper_total(planned.parameters)) == 533
    served = planned.serving
    assert [millions(n) for n in (served.encoder.total, served.decoder.total, paper_total(served))] == [
        wanted_encoder,
        wanted_decoder,
        total,
    ]


@pytest.mark.parametrize("task", ["pair", "target"])
def test_beyond_distillation_table_7_rows_that_contradict_the_others(task):
    """Task encoder, token decoder: the paper has 214M + 25M; token encoder, task decoder: 19M + 221M. Both
    total 338M.

    They are right when swapped, with one expert of a layer served; the rows above and table 8 count the two
    of top-2.
    """
    swapped = plan(task_moe("token", task, top_k=1)).serving
    assert [millions(n) for n in (swapped.encoder.total, swapped.decoder.total, paper_total(swapped))] == [
        214,
        25,
        338,
    ]
    swapped = plan(task_moe(task, "token", top_k=1)).serving
    assert [millions(n) for n in (swapped.encoder.total, swapped.decoder.total, paper_total(swapped))] == [
        19,
        221,
        338,
    ]
    # With both experts each is 6.3M more, 344M in all.
    expert = 2 * 512 * 2048
    for encoder, decoder in (("token", task), (task, "token")):
        one, two = (plan(task_moe(encoder, decoder, top_k=k)).serving for k in (1, 2))
        assert two.whole.total - one.whole.total == pytest.approx(3 * expert, rel=1e-2)
        sides = [millions(two.encoder.total), millions(two.decoder.total), millions(paper_total(two))]
        assert sides == ([214, 32, 344] if encoder == "token" else [25, 221, 344])


@pytest.mark.parametrize(
    ("decoder", "decoder_served", "total"),
    [("token", "6.5B", "13.3B"), ("pair", "201M", "6.9B"), ("target", "201M", "6.9B")],
)
def test_beyond_distillation_table_8(decoder, decoder_served, total):
    planned = plan(task_moe("token", decoder, "web-big-128"))
    trained, served = planned.parameters, planned.serving

    def written(count: int) -> str:
        return f"{count / 1e9:.1f}B" if count > 1e9 else f"{count / 1e6:.0f}M"

    assert [written(part.total) for part in (trained.encoder, trained.decoder)] == ["6.5B", "6.5B"]
    assert round(paper_total(trained) / 1e9) == 13
    assert [written(n) for n in (served.encoder.total, served.decoder.total, paper_total(served))] == [
        "6.5B",
        decoder_served,
        total,
    ]


def test_condensing_multilingual_knowledge_naive():
    assert millions(plan(dense("iwslt14-switch-16")).parameters.whole.total) == 48
    assert millions(plan(dense("opus100-switch-16")).parameters.whole.total) == 242


def test_condensing_multilingual_knowledge_switch():
    """Tables 2 and 3 say 149M and 1002M; experts in the place of feed-forwards make 142M and 997M."""
    small, big = (
        plan(load_recipe(PAPERS / f"{name}-switch-16.yaml")).parameters.whole.total
        for name in ("iwslt14", "opus100")
    )
    assert (millions(small), millions(big)) == (142, 997)
    # 149M is reached when the six feed-forwards of 1.05M that the experts replace are counted as well.
    assert millions(small + 6 * (2 * 512 * 1024 + 1024 + 512)) == 149
    # 1002M is not reached that way (1048M); 0.5 % stay unexplained.
    assert millions(big + 6 * (2 * 1024 * 4096 + 4096 + 1024)) == 1048
    assert 1002e6 / big - 1 == pytest.approx(0.0046, abs=0.0005)


@pytest.mark.parametrize(("experts", "extra"), [(4, 38), (8, 88), (12, 138), (16, 189)])
def test_condensing_multilingual_knowledge_ablation(experts, extra):
    """Table 9: parameters that Switch layers add to Transformer-Base. 12 experts add 138.6M, which the paper
    cuts off.
    """
    base = ["model.preset=transformer-base", "data.vocabulary.size=32000"]
    moe = f"{{experts: {experts}, top_k: 1, routing: token}}"
    with_experts, without = (
        plan(
            load_recipe(
                PAPERS / "opus100-switch-16.yaml",
                [*base, f"model.encoder.moe={each}", f"model.decoder.moe={each}"],
            )
        )
        for each in (moe, "null")
    )
    added = with_experts.parameters.whole.total - without.parameters.whole.total
    assert added / 1e6 == pytest.approx(extra, abs=0.65 if experts == 12 else 0.5)


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (0, "a world of 0 ranks"),
        (3, "parallel.expert is 4, which does not divide the 3 processes"),
        (16, "data.batch.count is 8, which 16 data-parallel ranks cannot share evenly"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(world, message):
    with pytest.raises(UserError, match=message):
        plan(recipe_of("token", "token", expert=4), world)


def test_stage_and_precision_are_the_recipes():
    assert (
        plan(recipe_of("dense", "dense", stage=2)).stage,
        plan(recipe_of("dense", "dense", stage=2), 2).stage,
    ) == (0, 2)
    half = plan(recipe_of("dense", "dense", stage=2, bf16=True))
    assert (half.stage, half.precision) == (2, "bfloat16")


def test_plan_of_thirteen_billion_needs_no_torch(tmp_path):
    code = (
        "import sys; from lsmoe_ds.planning.plan import plan; from lsmoe_ds.config.file import "
        "load_recipe;made = plan(load_recipe(sys.argv[1])); made.table(); print(made.parameters.whole.total, "
        "'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(PAPERS / "web-big-128.yaml")]
    total, torch_is_there = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.split()
    assert int(total) > 13e9
    assert torch_is_there == "False"


def test_tables_and_json_say_the_same(capsys):
    planned = plan(recipe_of("target", "target", expert=2, expert_groups=2, stage=2), 4)
    value = json.loads(json.dumps(planned.to_dict()))
    assert value["parameters"]["total"] == planned.parameters.whole.total
    assert value["layout"] == {"world": 4, "tensor": 1, "expert": 2, "data": 4}
    assert value["flops"]["source_training"] == 3 * planned.flops.source
    assert value["memory"][5]["total"] == planned.memory[5].total
    Console(width=160).print(planned.table())
    shown = capsys.readouterr().out
    assert "float32 ZeRO 2 <- recipe" in shown
    assert in_bytes(planned.memory[2].total) in shown
    assert "needs data.batch.languages: task-affine" in shown
    Console(width=160).print(plan(recipe_of("dense", "dense")).table())
    assert "expert parallelism" not in capsys.readouterr().out
