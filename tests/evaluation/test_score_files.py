"""Tokenizers and `lsmoe score`, beside sacrebleu's own command and its own sentencepiece tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import sentencepiece
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers import tokenizer_spm
from support.small_corpora import write_lines
from typer.testing import CliRunner

from lsmoe_ds.cli import app
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation import metrics as module
from lsmoe_ds.evaluation.comet import Comet
from lsmoe_ds.evaluation.direction_scores import score_direction
from lsmoe_ds.evaluation.evaluate import evaluate
from lsmoe_ds.evaluation.metrics import TOKENIZERS, Tokenizer, bleu_tokenizer
from lsmoe_ds.evaluation.score_files import score_files
from lsmoe_ds.evaluation.scores import ScoreTable

HYPOTHESES = ["The page, as it was saved, is here.", "Show the users' changes", "", "It's 1.39 of 2,000 km/h"]
REFERENCES = [
    "The page as it was saved is here.",
    "Show all users' changes",
    "Nothing",
    "It is 1.39 of 2,000 km/h",
]
OTHERS = [
    "Here is the page, as it was saved.",
    "Show the changes of users",
    "Nothing!",
    "It's 1.39 out of 2000 km/h",
]
SOURCES = [
    "Die Seite, wie gespeichert, ist hier.",
    "Zeige die Änderungen",
    "Nichts",
    "Es sind 1.39 von 2,000 km/h",
]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    found = {}
    for name, lines in (("hyp", HYPOTHESES), ("ref", REFERENCES), ("ref2", OTHERS), ("src", SOURCES)):
        found[name] = tmp_path / name
        write_lines(found[name], lines)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    write_lines(folder / "text", [*HYPOTHESES, *REFERENCES, *OTHERS] * 3)
    arguments = {
        "input": folder / "text",
        "model_prefix": folder / "pieces",
        "vocab_size": 48,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        " ".join(f"--{name}={value}" for name, value in arguments.items())
    )
    return folder / "pieces.model"


def sacrebleu_says(*arguments: object) -> dict[str, dict]:
    command = [sys.executable, "-m", "sacrebleu", *map(str, arguments), "-m", "bleu", "chrf", "-w", "9"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return {each["name"]: each for each in found}


def test_scores_are_those_of_the_command_sacrebleu(files) -> None:
    for references in ([files["ref"]], [files["ref"], files["ref2"]]):
        ours = score_files(files["hyp"], references, files["src"], "eng_Latn")
        theirs = sacrebleu_says(*references, "-i", files["hyp"])
        assert (
            ours.metrics["bleu"] == pytest.approx(theirs["BLEU"]["score"]) and 0 < ours.metrics["bleu"] < 100
        )
        assert ours.metrics["chrf"] == pytest.approx(theirs["chrF2"]["score"])
        assert ours.signatures["bleu"] == theirs["BLEU"]["signature"]
    copied = sacrebleu_says(files["ref"], "-i", files["src"])
    found = score_files(files["hyp"], [files["ref"]], files["src"], "en")
    assert found.copy and found.copy["bleu"] == pytest.approx(copied["BLEU"]["score"])
    assert (found.to, found.sentences, found.exact) == ("en", 4, 0) and found.weak == 0.25


def test_the_command_shows_scores(files) -> None:
    arguments = ["score", "--hypothesis", str(files["hyp"]), "--reference", str(files["ref"]), "--to", "en"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "tok:13a" in shown.stdout and "copying" not in shown.stdout
    value = json.loads(CliRunner().invoke(app, [*arguments, "--source", str(files["src"]), "--json"]).stdout)
    assert {
        "bleu",
        "chrf",
        "chrfpp",
        "copy",
        "signatures",
        "sentences",
    } <= value.keys() and "comet" not in value
    chinese = CliRunner().invoke(app, [*arguments[:-1], "zho_Hans", "--json"])
    assert "tok:zh" in json.loads(chinese.stdout)["signatures"]["bleu"]


def test_files_that_do_not_belong_together(files, tmp_path) -> None:
    write_lines(tmp_path / "short", REFERENCES[:3])
    (tmp_path / "empty").touch()
    for hypothesis, reference, options, message in (
        ("hyp", "short", {"to": "en"}, r"hyp has 4 lines but .*short has 3"),
        ("empty", "empty", {"to": "en"}, "empty holds no text"),
        ("hyp", "none", {"to": "en"}, "there is no file .*none"),
        ("hyp", "ref", {}, "give the language of the translations with --to, or --tokenize"),
        ("hyp", "ref", {"to": "en", "comet": tmp_path}, "--comet needs the sources, too: give --source"),
    ):
        with pytest.raises(UserError, match=message):
            score_files(tmp_path / hypothesis, [tmp_path / reference], **options)


@pytest.mark.parametrize("name", ["13a", "zh", "char", "intl"])
def test_a_tokenizer_of_choice(files, name) -> None:
    ours = score_files(files["hyp"], [files["ref"]], to="de", tokenize=name)
    theirs = sacrebleu_says(files["ref"], "-i", files["hyp"], "-tok", name)["BLEU"]
    assert (ours.metrics["bleu"], ours.signatures["bleu"]) == (
        pytest.approx(theirs["score"]),
        theirs["signature"],
    )


def test_a_sentencepiece_model_of_ones_own_counts_as_sacrebleus(files, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    shutil.copyfile(model, tmp_path / "models" / "flores200sacrebleuspm")
    theirs = BLEU(tokenize="flores200").corpus_score(HYPOTHESES, [REFERENCES])
    ours = score_files(files["hyp"], [files["ref"]], tokenize=f"spm:{model}")
    flores = score_files(files["hyp"], [files["ref"]], tokenize="flores200")
    assert ours.metrics["bleu"] == flores.metrics["bleu"] == theirs.score
    assert theirs.score not in (
        score_files(files["hyp"], [files["ref"]], tokenize=name).metrics["bleu"] for name in ("13a", "char")
    )
    checksum = hashlib.sha256(model.read_bytes()).hexdigest()[:12]
    assert (
        f"|tok:spm-{checksum}|" in ours.signatures["bleu"] and "|tok:flores200|" in flores.signatures["bleu"]
    )


def test_a_tokenizer_that_is_not_there_is_refused(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path / "cache"))

    def offline(*arguments: object) -> None:
        (tmp_path / "cache" / "models").mkdir(parents=True, exist_ok=True)
        (
            tmp_path / "cache" / "models" / "sacrebleu_tokenizer_spm.model"
        ).touch()  # as a download that was cut off leaves it
        raise OSError("Name or service not known")

    monkeypatch.setattr(tokenizer_spm, "download_file", offline)
    monkeypatch.setattr(module, "_installed", lambda name: False)
    (tmp_path / "text").write_text("no model")
    path = tmp_path / "cache" / "models" / "sacrebleu_tokenizer_spm.model"
    instead = "put it there, or choose --tokenize spm:FILE with a sentencepiece model of yours, or 13a"
    for name, message in (
        (
            "flores101",
            (
                rf"needs the model {path}, which could not be downloaded \(Name or service not known\):"
                rf" {instead}"
            ),
        ),
        ("ja-mecab", r"needs packages that are not installed: pip install 'sacrebleu\[ja\]'"),
        ("ko-mecab", r"pip install 'sacrebleu\[ko\]'"),
        ("13", r"'13' is no tokenizer of --tokenize.*: choose 13a, zh, .* or spm:FILE"),
        ("none", "is no tokenizer"),
        (f"spm:{tmp_path / 'none'}", "there is no file .*none"),
        (f"spm:{tmp_path / 'text'}", "text is no sentencepiece model"),
    ):
        with pytest.raises(UserError, match=message):
            Tokenizer.parse(name)
    assert not path.exists()
    path.write_text("half a model")
    with pytest.raises(UserError, match=r"is no sentencepiece model.*; remove it and put it there"):
        Tokenizer.parse("flores101")
    shutil.copyfile(model, path)
    assert Tokenizer.parse("flores101") == Tokenizer("flores101")
    assert {
        bleu_tokenizer(code) for code in ("de", "ja", "ko", "zh_Hant", "yue", "lo", "dz", "shn", "xx")
    } <= set(TOKENIZERS)


@pytest.mark.parametrize("name", ["flores101", "flores200"])
def test_a_missing_tokenizer_is_refused_before_a_run_is_opened(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))

    def offline(*arguments: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(tokenizer_spm, "download_file", offline)
    path = tmp_path / "models" / Path(tokenizer_spm.SPM_MODELS[name]["url"]).name
    with pytest.raises(UserError, match=f"--tokenize {name} needs the model {path}, .*: put it there, or"):
        evaluate(tmp_path / "no run", tokenize=name)


class Stub(types.ModuleType):
    """What we use of the package comet: the score of a translation is its share of the reference's words."""

    def __init__(self) -> None:
        super().__init__("comet")
        self.loaded: list[str] = []

    def load_from_checkpoint(self, path: str) -> Stub:
        if "broken" in path:
            raise RuntimeError("hparams.yaml file is missing")
        self.loaded.append(path)
        return self

    def predict(
        self, samples: list[dict[str, str]], batch_size: int, gpus: int, progress_bar: bool
    ) -> types.SimpleNamespace:
        scores = [
            len({*s["mt"].split()} & {*s["ref"].split()}) / len(s["ref"].split()) - len(s["src"]) * 1e-3
            for s in samples
        ]
        return types.SimpleNamespace(scores=scores, system_score=sum(scores) / len(scores))


def test_comet_where_it_is_installed(files, tmp_path, monkeypatch) -> None:
    arguments = [
        "score",
        "--hypothesis",
        str(files["hyp"]),
        "--reference",
        str(files["ref"]),
        "--source",
        str(files["src"]),
        "--to",
        "en",
    ]
    (tmp_path / "wmt" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "wmt" / "checkpoints" / "model.ckpt"
    checkpoint.write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(
        UserError, match="needs the package unbabel-comet, which is not installed: pip install unbabel-comet"
    ):
        Comet.find(checkpoint)
    stub = Stub()
    stub.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "comet", stub)
    found = CliRunner().invoke(app, [*arguments, "--comet", str(tmp_path / "wmt"), "--json"])
    value = json.loads(found.stdout)
    words = (6 / 8 + 3 / 4 + 0 + 4 / 6) / 4  # in the reference and the translation, of those in the reference
    assert value["comet"] == pytest.approx(words - sum(map(len, SOURCES)) / 4 * 1e-3) and stub.loaded == [
        str(checkpoint)
    ]
    assert value["signatures"]["comet"] == "comet-" + hashlib.sha256(b"weights").hexdigest()[:12]
    assert "COMET" in CliRunner().invoke(app, [*arguments, "--comet", str(checkpoint)]).stdout
    assert "COMET" not in CliRunner().invoke(app, arguments).stdout
    comet = Comet.open(checkpoint)
    plain = score_direction(Direction("de", "en"), SOURCES, HYPOTHESES, REFERENCES)
    scored = comet.add(plain, SOURCES, HYPOTHESES, REFERENCES)
    table = ScoreTable("x", 1, "test", 5, 1.0, (scored,), comet=comet.name)
    assert scored.comet == pytest.approx(value["comet"]) and ScoreTable.from_json(table.to_json()) == table
    assert table.question.endswith(f".{comet.name}") and table.signatures()["comet"] == [comet.name]
    assert [column.header for column in table.render().columns][-2] == "COMET"
    assert "comet" not in ScoreTable("x", 1, "test", 5, 1.0, (plain,)).to_json()
    (tmp_path / "broken").touch()
    for path, message in (
        ("none", "there is no checkpoint .*none"),
        ("broken", "cannot be loaded: hparams.yaml file is missing"),
    ):
        with pytest.raises(UserError, match=message):
            Comet.open(tmp_path / path)
