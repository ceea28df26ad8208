"""Plans of the paper's encoders: tables 4 and 5 of "Condensing Multilingual Knowledge"."""

import json

import pytest
from support.small_encoder import write_encoder

from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.planning.plan import plan

pytest.importorskip("transformers")
XLM_R_BASE = {
    "architectures": ["XLMRobertaForMaskedLM"],
    "model_type": "xlm-roberta",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
LMS, NAIVE = "model.low_rank.fuse_distillation=false", "model.low_rank=null"
# By LMS with fuse distillation, LMS, and in serving by the shared route, in millions beyond the plain model.
PAPER = {"wikiann24": (73, 70, 3), "tydiqa6": (20, 17, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_encoder(tmp_path_factory.mktemp("xlm-r"))
    (path / "config.json").write_text(json.dumps(XLM_R_BASE))
    return path


@pytest.mark.parametrize("name", PAPER)
def test_the_parameters_are_those_of_the_paper(folder, name):
    def total(*changes: str):
        return plan(load_recipe(f"papers/{name}", [f"model.huggingface={folder}", *changes]))

    plain = total(NAIVE).parameters.whole.total
    assert plain == 277_453_056 + 768 * (head := {"wikiann24": 7, "tydiqa6": 2}[name]) + head
    distilled, alone = total(), total(LMS)
    languages = {"wikiann24": 24, "tydiqa6": 6}[name]
    each = 32 * (768 + 3072) * 2 * 12  # 2.9M a language
    assert alone.parameters.whole.total - plain == languages * each
    assert distilled.parameters.whole.total - plain == (languages + 1) * each
    assert distilled.routes["shared"].whole.total - plain == each
    found = (languages + 1) * each, languages * each, each
    for number, wanted in zip(found, PAPER[name], strict=True):
        assert number / 1e6 == pytest.approx(wanted, abs=1.0)
