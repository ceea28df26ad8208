"""Encoders of transformers that tag words and find answers: losses, methods, data, and what is refused."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from support.small_encoder import (
    KINDS,
    OTHERS,
    SIZES,
    built,
    encoder_recipe,
    encoder_settings,
    example,
    recipe_of,
    write_all,
)

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import IGNORED
from lsmoe_ds.model.freezing import freeze
from lsmoe_ds.model.host import LabellingModel
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.costs import Parts

transformers = pytest.importorskip("transformers")
CLASSES = {"tag": "AutoModelForTokenClassification", "answer": "AutoModelForQuestionAnswering"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("encoders"), KINDS | OTHERS)


def theirs(model: LabellingModel, task: str, folder, kind: str):
    """Load the model as a user of transformers would, with the same head."""
    config = model.host.config
    found = getattr(transformers, CLASSES[task]).from_pretrained(folder / kind, config=config)
    state = {name.removeprefix("host."): value for name, value in model.state_dict().items()}
    found.load_state_dict({name: value for name, value in state.items() if "low_rank" not in name})
    return found.eval()


@pytest.mark.parametrize("kind", (*KINDS, *OTHERS))
@pytest.mark.parametrize("task", CLASSES)
def test_without_methods_the_loss_is_that_of_transformers(folder, kind, task):
    recipe = recipe_of(folder, kind, task)
    model, batch = built(recipe), example(recipe)
    other = theirs(model, task, folder, kind)
    given = {"input_ids": batch.tokens, "attention_mask": (batch.real > 0).long()}
    if kind == "Bert":
        given["token_type_ids"] = (batch.real == 2).long()
    found = model(*batch.inputs)
    if task == "tag":
        logits = other(**given).logits
        wanted = F.cross_entropy(logits[batch.read], batch.labels[batch.read], reduction="sum")
        torch.testing.assert_close(found.loss, other(**given, labels=batch.labels).loss * batch.target_tokens)
    else:
        both, hidden = other(**given), batch.real == 0
        ends = [each.masked_fill(hidden, -1e4) for each in (both.start_logits, both.end_logits)]
        wanted = sum(F.cross_entropy(e, batch.labels[:, i], reduction="sum") for i, e in enumerate(ends))
        assert batch.target_tokens == 2 * len(batch.tokens)
    torch.testing.assert_close(found.nll, wanted)
    assert Parts.of(recipe).whole.total == other.num_parameters()


@pytest.mark.parametrize("kind", (*KINDS, *OTHERS))
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("shared", (False, True))
def test_matrices_of_languages_and_fuse_distillation(folder, kind, task, shared):
    """LMS language-wise at the feed-forwards, and FD: equations 1, 3 and 4 of the paper in plain torch."""
    recipe = recipe_of(
        folder, kind, task, rank=2, index="language", at="feed_forward", fuse_distillation=shared
    )
    model, batch = built(recipe), example(recipe, 1)
    other = theirs(model, task, folder, kind)
    weights = {name: value for name, value in model.named_parameters() if "low_rank" in name}

    def logits(row: int, language: int) -> torch.Tensor:
        rows = slice(2 * language, 2 * language + 2)
        replaced = {}
        for at, module in model.outline.modules.items():
            if "feed_forward" in at:
                own = model.get_submodule(f"{at}_low_rank")
                product = own.vertical[rows].t() @ own.flat[rows]
                replaced[f"{module}.weight"] = other.get_parameter(f"{module}.weight") + product
        given = {"input_ids": batch.tokens[[row]], "attention_mask": (batch.real[[row]] > 0).long()}
        if kind == "Bert":
            given["token_type_ids"] = (batch.real[[row]] == 2).long()
        found = torch.func.functional_call(other, replaced, (), given)
        if task == "tag":
            return found.logits[0]
        both = torch.stack([found.start_logits[0], found.end_logits[0]])
        return both.masked_fill(batch.real[[row]] == 0, -1e4)

    total = torch.zeros(())
    for row in range(3):
        own, labels = logits(row, row), batch.labels[row]
        specific, labels = own[labels != IGNORED], labels[labels != IGNORED]
        nll = F.cross_entropy(specific, labels, reduction="sum")
        total = total + nll
        if shared:
            common = logits(row, 3)[batch.labels[row] != IGNORED]
            p, q = specific.log_softmax(-1), common.log_softmax(-1)
            divergence = (F.kl_div(p, q, log_target=True, reduction="sum") * 0.5) + (
                F.kl_div(q, p, log_target=True, reduction="sum") * 0.5
            )
            total = total - nll / 2 + F.cross_entropy(common, labels, reduction="sum") / 2 + divergence
    total.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in weights.items()}
    head = {name: p.grad.clone() for name, p in other.named_parameters() if name.startswith(("cl", "qa"))}
    model.zero_grad()
    model.train()
    found = model(*batch.inputs)
    loss = found.loss + sum(found.further.values())
    loss.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    for name, parameter in weights.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=2e-5)
    for name, gradient in head.items():
        torch.testing.assert_close(model.host.get_parameter(name).grad, gradient, rtol=1e-4, atol=2e-5)


def test_the_head_begins_at_random_and_trains_with_the_methods(folder):
    recipe = recipe_of(folder, rank=2, at="all")
    one, two = built(recipe), built(recipe)
    assert torch.equal(one.host.classifier.weight, two.host.classifier.weight)
    assert one.host.classifier.weight.std() > 0.05 and not one.host.classifier.bias.any()
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder / "XLMRoberta")
    name = "roberta.encoder.layer.1.output.dense.weight"
    assert torch.equal(one.host.get_parameter(name), loaded.get_parameter(name))
    freeze(one, recipe, Topology.single())
    trains = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert {each for each in trains if "low_rank" not in each} == {
        "host.classifier.weight",
        "host.classifier.bias",
    }


BAD = [
    ({"model": {"task": "answer"}}, "'model.task' is answer, but 'data.corpora' are text to tag"),
    ({"data": {"directions": ["de-en"]}}, "'directions' is for translation, but wikiann is a format"),
    ({"data": {"prompt": {"text": "{source}"}}}, "'prompt' is for translation"),
    (
        {"data": {"groups": {"high": 50, "medium": 5}}},
        "'groups' has numbers of training pairs, of which labelled",
    ),
    ({"data": {"labels": ["B-PER", "O"]}}, "'labels' begins with B-PER: O, of a word in no name"),
    ({"data": {"labels": ["O", "PER"]}}, "'labels' has PER, which is no tag of the BIO scheme"),
    ({"data": {"stride": 9}}, "'stride' is for corpora of the format squad"),
    ({"data": {"languages": []}}, "corpora of the format wikiann are by language: list 'languages'"),
    (
        {"data": {"batch": {"max_length": 65}}},
        "'data.batch.max_length' is 65, more than the 64 tokens that the model reads",
    ),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_what_does_not_fit_is_refused_with_a_sentence(folder, changes, said):
    settings = encoder_settings(folder, folder / "XLMRoberta")
    for section, values in changes.items():
        settings[section].update(values)
    with pytest.raises(ValueError) as error:
        Recipe.model_validate(settings)
    assert said in str(error.value)


def test_places_of_answers_are_not_smoothed(folder):
    settings = encoder_settings(folder, folder / "XLMRoberta", "answer")
    settings["training"]["label_smoothing"] = 0.1
    with pytest.raises(ValueError, match="the places of an answer are not smoothed: set it to 0"):
        Recipe.model_validate(settings)


def test_a_head_of_other_labels_is_refused(folder, tmp_path):
    """Rows of the head would be of other tags."""
    recipe = recipe_of(folder)
    model = built(recipe)
    shutil.copytree(folder / "XLMRoberta", tmp_path / "headed")
    model.host.save_pretrained(tmp_path / "headed")
    settings = encoder_settings(folder, tmp_path / "headed")
    again = LabellingModel(Recipe.model_validate(settings), recipe.data.vocabulary.size)
    assert torch.equal(again.host.classifier.weight, model.host.classifier.weight) and not again._fresh
    settings["data"]["labels"] = ["O", "I-PER", *recipe.data.labels[1:2], *recipe.data.labels[3:]]
    with pytest.raises(
        ValueError, match=r"the model tags words by O, B-PER, I-PER.*but 'data.labels' are O, I-PER"
    ):
        Recipe.model_validate(settings)


def test_answers_have_two_ends_whatever_the_folder_says(folder, tmp_path):
    shutil.copytree(folder / "Bert", tmp_path / "nli")
    config = json.loads((tmp_path / "nli/config.json").read_text())
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "nli/config.json").write_text(json.dumps({**config, **names}))
    model = LabellingModel(encoder_recipe(folder, tmp_path / "nli", "answer"), 100)
    assert model.host.qa_outputs.out_features == 2


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("at", ("all", "attention", "encoder.1", ["feed_forward", "self_attention"]))
def test_an_attention_of_another_kind_has_no_matrices(folder, kind, at):
    """DeBERTa multiplies distances by the matrices of queries, Longformer reads positions first."""
    name = {"DebertaV2": "query_proj", "Longformer": "query_global"}[kind]
    with pytest.raises(ValueError, match=rf"whose linear layer attention.self.{name} is of no known kind"):
        encoder_recipe(folder, folder / kind, rank=2, at=at)
    with pytest.raises(ValueError, match=r"'attention.value' names no linear layer"):
        encoder_recipe(folder, folder / kind, rank=2, at=["feed_forward", "attention.value"])


TYPES = {
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "yoso": {},
    "fnet": {},
    "convbert": {},
}


@pytest.mark.parametrize("kind", (*TYPES, "bert", "deberta-v2"))
def test_a_model_that_reads_padding_is_refused(folder, kind, tmp_path):
    """As it would train on other labels than those of each text alone."""
    sizes = {**SIZES, "embedding_size": 32, "vocab_size": 130, "max_position_embeddings": 66}
    config = transformers.AutoConfig.for_model(kind, **sizes, **TYPES.get(kind, {}))
    torch.manual_seed(1)
    model = transformers.AutoModelForTokenClassification.from_config(config).eval()
    tokens = torch.randint(5, 130, (1, 12))
    mask = torch.tensor([[1] * 9 + [0] * 3])
    options = {} if kind == "fnet" else {"attention_mask": mask}  # it takes none
    with torch.no_grad():
        padded, alone = model(tokens, **options).logits[:, :9], model(tokens[:, :9]).logits
    assert torch.allclose(padded, alone, atol=1e-5) == (kind not in TYPES)
    config.save_pretrained(tmp_path)
    shutil.copy(folder / "XLMRoberta/tokenizer.json", tmp_path)
    if kind not in TYPES:
        assert encoder_recipe(folder, tmp_path, rank=2, at="feed_forward")
        return
    with pytest.raises(ValueError, match=f"of the type {kind}, whose labels of a text depend on the padding"):
        encoder_recipe(folder, tmp_path)


def test_a_decoder_cannot_tag(folder, tmp_path):
    transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48
    ).save_pretrained(tmp_path)
    shutil.copy(folder / "XLMRoberta/tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="models that are an encoder alone can tag here"):
        encoder_recipe(folder, tmp_path)
