"""Tiny encoders of transformers, labelled text in three languages, and recipes on them."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import SequenceBatch
from lsmoe_ds.data.forms import form_of
from lsmoe_ds.data.prepare import prepare
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.directions import Direction
from lsmoe_ds.model.host import LabellingModel
from lsmoe_ds.model.initialization import initialize
from lsmoe_ds.parallel.topology import Topology
from support.small_host import SIZES, two_steps

LANGUAGES = ("de", "en", "fr")
KINDS: dict[str, dict[str, Any]] = {"XLMRoberta": {}, "Bert": {}}
OTHERS: dict[str, dict[str, Any]] = {  # whose feed-forwards alone are BERT's
    "DebertaV2": {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Longformer": {"attention_window": 8, "sep_token_id": 2},
}
DE = Direction("de", "de")
NAMES = {"PER": ("Anna Berg", "Otto", "Li Wei"), "LOC": ("Bonn", "New York"), "ORG": ("Acme Corp",)}
WORDS = {"de": "wohnt in und mag", "en": "lives in and likes", "fr": "habite à et aime"}


def write_encoder(folder: Path, kind: str = "XLMRoberta", **settings: Any) -> Path:
    """Save a random masked language model of a class of transformers, with a tokenizer in its style."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    named = [name for several in NAMES.values() for name in several]
    text = [*WORDS.values(), *named, "wer wo? who where? qui."]
    letters = list(string.ascii_letters + string.digits)
    if kind == "Bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(
            vocab_size=130, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        around = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
        ends = [("[CLS]", 2), ("[SEP]", 3)]
    else:
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=130,
            special_tokens=special,
            unk_token="<unk>",
            initial_alphabet=letters,
            show_progress=False,
        )
        around = {"single": "<s> $A </s>", "pair": "<s> $A </s> </s> $B </s>"}
        ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.train_from_iterator(text * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(**around, special_tokens=ends)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, unknown, first, last, mask = (
        (special[0], special[1], special[2], special[3], special[4])
        if kind == "Bert"
        else (special[1], special[3], special[0], special[2], special[4])
    )
    named = {
        "pad_token": pad,
        "unk_token": unknown,
        "cls_token": first,
        "sep_token": last,
        "mask_token": mask,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**named, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    size = tokenizer.get_vocab_size()
    ids = {"pad_token_id": tokenizer.token_to_id(pad), "vocab_size": size, "max_position_embeddings": 66}
    types = {"type_vocab_size": 2 if kind == "Bert" else 1}
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **ids, **types, **settings})
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def sentence(code: str, chosen: random.Random) -> list[tuple[str, str]]:
    """Return words with tags."""
    found: list[tuple[str, str]] = []
    for word in WORDS[code].split():
        kind = chosen.choice(list(NAMES))
        if word in ("in", "à"):
            kind = "LOC"
        name = chosen.choice(NAMES[kind]).split()
        named = [(part, f"{'I' if i else 'B'}-{kind}") for i, part in enumerate(name)]
        found += [*named, (word, "O")]
    return found


def write_names(folder: Path, count: int = 40) -> Path:
    """Write a corpus in WikiANN's layout."""
    for code in LANGUAGES:
        for split, number in (("train", count), ("dev", 8), ("test", 9)):
            chosen = random.Random(f"{code} {split}")
            lines = []
            for _ in range(number):
                lines += [f"{code}:{word}\t{tag}" for word, tag in sentence(code, chosen)] + [""]
            (folder / code).mkdir(parents=True, exist_ok=True)
            (folder / code / split).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_questions(folder: Path, count: int = 20) -> Path:
    """Write questions in the files of XTREME's TyDiQA-GoldP: contexts longer than a window."""
    folder.mkdir(parents=True, exist_ok=True)
    for code in LANGUAGES:
        for split, number in (("train", count), ("dev", 6)):
            chosen = random.Random(f"{code} {split} questions")
            paragraphs = []
            for i in range(number):
                words = [sentence(code, chosen) for _ in range(chosen.choice((1, 4)))]
                context = "\n".join(" ".join(word for word, _ in each) + "." for each in words)
                name = next(word for word, tag in words[-1] if tag == "B-LOC")
                answer = {"text": name, "answer_start": context.rindex(name)}
                asked = {"id": f"{code}-{i}", "question": "where?", "answers": [answer]}
                paragraphs.append({"context": context, "qas": [asked]})
            value = {"data": [{"title": code, "paragraphs": paragraphs}]}
            (folder / f"small.goldp.{code}.{split}.json").write_text(json.dumps(value))
    return folder


def encoder_settings(
    folder: Path, host: Path, task: str = "tag", stage: int = 0, **low_rank: Any
) -> dict[str, Any]:
    """Return a recipe on what :func:`write_names` has written to ``names``, or the questions."""
    corpus = {"tag": ("names", "wikiann"), "answer": ("questions", "squad")}[task]
    return {
        "name": task,
        "data": {
            "corpora": [{"path": str(folder / corpus[0]), "format": corpus[1]}],
            "directory": str(folder / "data"),
            "languages": list(LANGUAGES),
            "batch": {"tokens": 256, "count": 2, "max_length": 48},
            **({"stride": 16} if task == "answer" else {}),
        },
        "model": {"huggingface": str(host), "task": task, "low_rank": low_rank or None},
        **two_steps(stage, "methods" if low_rank else "all"),
    }


def encoder_recipe(folder: Path, host: Path, task: str = "tag", stage: int = 0, **low_rank: Any) -> Recipe:
    return Recipe.model_validate(encoder_settings(folder, host, task, stage, **low_rank))


def write_all(path: Path, kinds: Mapping[str, dict[str, Any]] = KINDS) -> Path:
    """Write encoders, by default both, and both corpora, and prepare them for each."""
    write_names(path / "names")
    write_questions(path / "questions")
    for kind, settings in kinds.items():
        write_encoder(path / kind, kind, **settings)
        for task in ("tag", "answer"):
            prepare(recipe_of(path, kind, task))
    return path


def recipe_of(
    folder: Path, kind: str = "XLMRoberta", task: str = "tag", stage: int = 0, **low_rank
) -> Recipe:
    recipe = encoder_recipe(folder, folder / kind, task, stage, **low_rank)
    recipe.data.name = f"{task}-{kind}"
    return recipe


def form_and_pairs(recipe: Recipe, split: str = "train"):
    prepared = PreparedData.of(recipe)
    form = form_of(recipe.data, recipe.languages, prepared.vocabulary)
    return form, [prepared.tokens(direction, split) for direction in recipe.languages.directions]


def example(recipe: Recipe, each: int = 2) -> SequenceBatch:
    """Return a batch of training sequences of all languages."""
    form, pairs = form_and_pairs(recipe)
    chosen = [(d, i) for d in range(len(pairs)) for i in range(each)]
    return form.collate(
        [pairs[d].source[i] for d, i in chosen],
        [pairs[d].target[i] for d, i in chosen],
        [d for d, _ in chosen],
    )


def built(recipe: Recipe) -> LabellingModel:
    """Return a model whose head and low-rank matrices are drawn, in evaluation mode."""
    model = LabellingModel(recipe, recipe.data.vocabulary.size)
    initialize(model, 1, Topology.single())
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "low_rank" in name:
            parameter.data.normal_(0.0, 0.2)
    return model.eval()
