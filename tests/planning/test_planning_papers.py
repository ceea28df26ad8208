"""Plans reproduce the parameter counts of two papers."""

from __future__ import annotations

import pytest
from support.plans import PAPERS, dense, millions, task_moe

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.planning.costs import Parts
from lsmoe_ds.planning.plan import plan


def paper_total(parts: Parts) -> int:
    """Return the total number of parameters as the paper counts it.

    The paper has three matrices of the vocabulary ("33M" and "Softmax 65M"); the model here ties them to one.
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
