"""The code of model cards and of docs/convert.md, executed as a stranger would who copies it."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PROJECT
from support.commands import main
from support.conversions import EN_DE, global_weights, random_model
from support.small_run import PAIR_TOP1, TARGET_TOP2, write_corpus
from support.snippets import blocks, run

from lsmoe_ds.checkpoint.stored import find_model, write_folder
from lsmoe_ds.convert.command import convert
from lsmoe_ds.convert.uses import MENDED
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.export.subnetwork import extract
from lsmoe_ds.inference.load import Loaded, load
from lsmoe_ds.inference.translate import translate
from lsmoe_ds.languages import EOS, PAD
from lsmoe_ds.methods.low_rank.settings import LowRank

# Decomposed letters, a soft hyphen, a no-break space, a word joiner, a byte order mark, a tab, an ideographic
# space.
ODD = ["\ufeffba\u00adde\u00a0fi", "e\u0301  ko\tla", "ko\u3000mi\u2060la", "a\u0308<2de>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Write a dense model of one direction and one of all directions, convert both, and return their folder.

    Each is converted for Hugging Face and for CTranslate2, and to a dense folder.
    """
    folder = tmp_path_factory.mktemp("snippets")
    write_corpus(folder)
    shared = random_model(folder, None, None, LowRank(rank=3, fuse_distillation=True))
    for name, model, direction, route in (
        ("one", random_model(folder, TARGET_TOP2, PAIR_TOP1), EN_DE, "specific"),
        ("all", shared, None, "shared"),
    ):
        tensors, recipe = extract(global_weights(model.model), model.recipe, direction, route)
        of = {"direction": str(direction or "all"), "route": route, "sparse_parameters": 1}
        write_folder(
            folder / name,
            tensors,
            recipe,
            model.home / "vocabulary.model",
            {"kind": "dense", "run": "small", "step": 2, **of},
        )
        for kind in ("huggingface", "ctranslate2", "dense"):
            convert(folder / name, kind, None, folder / f"{name}-{kind}", check=0)
    return folder


@pytest.mark.parametrize("name", ["one", "all"])
def test_the_cards_code_for_ctranslate2_reads_text_as_we_do(place, name, capsys):
    folder = place / f"{name}-ctranslate2"
    (code,) = blocks((folder / "README.md").read_text())
    ours = load(place / name, "cpu")
    direction = ours.languages.directions[0]
    for line in (*ODD, "ba de fi", "日本 ba", "<2de>"):
        found = run(code.replace("FOLDER", str(folder)).replace('"Text to translate."', repr(line)), {})
        pieces = [ours.vocabulary._processor.id_to_piece(index) for index in ours.vocabulary.encode(line)]
        assert found["source"] == [f"<2{direction.target}>", *pieces], line
        said = " ".join(capsys.readouterr().out.split())
        assert said == " ".join(next(translate(ours, direction, [line])).split()), line


def test_text_that_is_not_cleaned_has_other_pieces(place):
    """So the test above can fail."""
    processor = load(place / "one", "cpu").vocabulary._processor
    assert all(
        processor.encode(line) != load(place / "one", "cpu").vocabulary.encode(line)
        for line in ("ba\u00adde", "ko\u00a0la")
    )


@pytest.mark.parametrize("name", ["one", "all"])
def test_the_cards_code_for_hugging_face(place, name, capsys):
    folder = place / f"{name}-huggingface"
    use, labels = blocks((folder / "README.md").read_text())
    ours = load(place / name, "cpu")
    direction = EN_DE if name == "one" else Direction("en", "fr")  # of all, the last target
    tag = ours.vocabulary.tag_id(direction.target)
    for line in ODD:
        found = run(use.replace("FOLDER", str(folder)).replace('"Text to translate."', repr(line)), {})
        assert found["inputs"]["input_ids"].tolist() == [[tag, *ours.vocabulary.encode(line), EOS]]
        (said,) = ast.literal_eval(capsys.readouterr().out)
        assert said == " ".join(next(translate(ours, direction, [line])).replace("⁇", " ").split())
    run(labels, found)
    assert found["batch"]["labels"] == [[*ours.vocabulary.encode("Its translation."), EOS]]


def test_the_cards_command(place, capsys, monkeypatch):
    for kind in ("dense", "ctranslate2"):
        text = (place / f"one-{kind}" / "README.md").read_text()
        source, target = re.search(r"lsmoe translate FOLDER --from (\w+) --to (\w+)", text).groups()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ba de fi\n")))
        assert main(["translate", str(place / f"one-{kind}"), "--from", source, "--to", target]) == 0
        assert capsys.readouterr().out.strip()


def test_the_code_of_the_documentation(place, capsys):
    """Each section of docs/convert.md for a library, from its first block to its last."""
    page = (PROJECT / "docs" / "convert.md").read_text(encoding="utf-8")
    sections = {section.partition("\n")[0]: blocks(section) for section in page.split("\n## ")}
    # That of PEFT runs in test_convert_peft.py.
    assert [len(sections[name]) for name in ("Hugging Face", "PEFT", "CTranslate2")] == [5, 1, 1]
    assert sum(map(len, sections.values())) == 7 and not blocks((PROJECT / "README.md").read_text())
    found: dict[str, Any] = {}
    # The fourth is of imported models: test_import_translates.py; the card of NLLB-MoE has the fifth, too.
    assert sections["Hugging Face"][4].endswith(f"\n{MENDED}")
    for code in sections["Hugging Face"][:3]:
        run(code.replace("DIR", str(place / "all-huggingface")), found)
    vocabulary = load(place / "all", "cpu").vocabulary
    assert found["inputs"]["input_ids"][:, 0].tolist() == [vocabulary.tag_id("fr")] * 2
    assert found["batch"]["labels"] == [[*vocabulary.encode("Its translation."), EOS]]
    (code,) = sections["CTranslate2"]
    run(code.replace("DIR", str(place / "one-ctranslate2")), {})
    assert capsys.readouterr().out.strip()
    (card,) = blocks((place / "one-ctranslate2" / "README.md").read_text())
    cleaning = card[card.index("def clean") : card.index("vocabulary = ")]
    assert cleaning in code


def test_a_training_step_in_transformers_has_our_loss_and_gradients(place):
    """With the labels of the card's code."""
    from transformers import DataCollatorForSeq2Seq

    ours: Loaded = load(place / "one", "cpu")
    theirs = Exported.load(find_model(place / "one-huggingface"))
    pairs = [("ba de fi", "ko laen"), ("ko la mi nobu", "su"), ("tabi", "de de de fi ko")]
    batch = theirs.tokenizer([source for source, _ in pairs], text_target=[target for _, target in pairs])
    batch["labels"] = [ids[1:] for ids in batch["labels"]]
    features = [{key: values[row] for key, values in batch.items()} for row in range(len(pairs))]
    made = DataCollatorForSeq2Seq(theirs.tokenizer, model=theirs.model)(features)
    found = theirs.model(**made)
    found.loss.backward()

    tokens = [[ours.vocabulary.encode(text) for text in side] for side in zip(*pairs, strict=True)]
    number = ours.languages.direction_id(EN_DE)
    wanted = DirectionIds.of(ours.languages, ours.vocabulary).collate(*tokens, [number] * len(pairs))
    assert torch.equal(made["labels"].masked_fill(made["labels"] == -100, PAD), wanted.labels)
    weight = ours.model.embedding.tokens.weight.requires_grad_(True)
    losses = ours.model(wanted.source, wanted.decoder_input, wanted.labels, wanted.ids)
    loss = losses.loss / wanted.target_tokens
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(theirs.model.model.shared.weight.grad, weight.grad, atol=1e-5)
    # The tag in the labels would make another loss.
    made["labels"] = torch.cat([torch.full((len(pairs), 1), ours.vocabulary.tag_id("de")), made["labels"]], 1)
    made.pop("decoder_input_ids", None)  # the collator may have made them of the labels before
    assert abs(theirs.model(**made).loss.item() - loss.item()) > 1e-3
