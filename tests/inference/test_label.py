"""`lsmoe label`: lines of a person in, tags or answers out, of a run or of a converted folder."""

import io
import json

import pytest
from support import encoder_runs
from support.commands import main
from support.encoder_runs import DE, recipe_of
from support.host_runs import trained
from support.small_encoder import LANGUAGES

from lsmoe_ds.convert.command import convert
from lsmoe_ds.data.prepared import PreparedData
from lsmoe_ds.errors import UserError
from lsmoe_ds.inference import stream
from lsmoe_ds.inference.label import Answer, label_all
from lsmoe_ds.inference.label_lines import label_chunks, names_of
from lsmoe_ds.inference.load import load
from lsmoe_ds.notices import notice

base, run, task = encoder_runs.base, encoder_runs.run, encoder_runs.task  # fixtures

transformers = pytest.importorskip("transformers")


@pytest.fixture
def label(monkeypatch, capsys):
    """Return a function that gives status, output and errors of the command on text."""

    def call(*arguments: object, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        status = main(["label", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def held_out(run) -> list[str]:
    return PreparedData.of(load(run).recipe).text(DE, "dev")[0]


def asked(line: str) -> tuple[str, str]:
    value = json.loads(line)
    return value["question"], " ".join(value["context"].split())


def test_lines_are_labelled_as_held_out_text_is(run, task, label, tmp_path):
    """With other spaces, and empty lines between; by a run, and by the folder made of it for a language."""
    sources = held_out(run)[:4]
    if task == "tag":
        text = "".join(f"  {line.replace(' ', '  ')}\t\n\n" for line in sources)
    else:
        sources = [
            json.dumps(dict(zip(("question", "context"), asked(each), strict=True))) for each in sources
        ]
        text = "".join("{}\t{}\n\n".format(*asked(line)) for line in sources)
        assert label(run, "--language", "de", text="\n\n".join(sources))[1] == label(
            run, "--language", "de", text=text
        )[1].removesuffix("\n")
    wanted = "".join(f"{line}\n\n" for line in label_all(load(run), DE, sources))
    assert label(run, "--language", "de", text=text) == (0, wanted, "")
    convert(run, "huggingface", DE, tmp_path / "out", check=0)
    assert label(tmp_path / "out", "--language", "ger", text=text)[1] == wanted
    other = label(run, "--language", "de", "--route", "shared", text=text)[1]
    assert other == "".join(f"{line}\n\n" for line in label_all(load(run, route="shared"), DE, sources))


def test_what_programs_read(run, task, label):
    sources = held_out(run)[:3]
    lines = sources if task == "tag" else ["{}\t{}".format(*asked(line)) for line in sources]
    status, out, _ = label(run, "--language", "de", "--json", text="\n".join([*lines, ""]) + "\n")
    *found, blank = map(json.loads, out.splitlines())
    assert status == 0 and len(found) == len(lines)
    if task == "tag":
        assert [" ".join(each["tags"]) for each in found] == label_all(load(run), DE, sources)
        assert [each["words"] for each in found] == [line.split() for line in sources]
        assert blank == {"words": [], "tags": [], "names": []}
        named = [
            (line, each) for line, found_in in zip(lines, found, strict=True) for each in found_in["names"]
        ]
        assert named and all(line[each["start"] : each["end"]] == each["text"] for line, each in named)
        return
    assert blank == {"answer": "", "score": None, "start": None, "end": None}
    for line, each in zip(lines, found, strict=True):
        context = line.partition("\t")[2]
        assert context[each["start"] : each["end"]] == each["answer"] != ""
        assert isinstance(each["score"], float)


def test_names_are_those_that_scores_count():
    from seqeval.metrics.sequence_labeling import get_entities

    for text in (
        "B-PER I-PER O B-LOC",
        "I-PER I-PER",
        "B-PER B-PER I-LOC I-LOC O I-ORG",
        "O B-ORG O I-ORG I-ORG B-ORG",
        "O",
        "",
    ):
        assert names_of(text.split()) == get_entities(text.split())


def test_a_wrong_line_is_named_after_the_lines_before_it(run, task, label):
    if task == "tag":
        assert label(run, "--language", "de", text="{")[0] == 0  # a word as any other
        return
    good, *_ = ["{}\t{}\n".format(*asked(line)) for line in held_out(run)]
    for bad in (
        "a question alone",
        '{"question": "who?"}',
        '{"question": "who?", "context": "\\ud800"}',
        "\ta",
    ):
        status, out, err = label(run, "--language", "de", text=f"{good}{bad}\n{good}")
        assert (status, len(out.splitlines())) == (2, 1), err
        assert err.startswith(
            "lsmoe: line 2: a question and its context were expected, as QUESTION<TAB>CONTEXT"
        )


def test_what_takes_long_is_told(run, task, label, monkeypatch):
    monkeypatch.setattr(stream, "LINE_EVERY", 0.0)
    line = "Anna wohnt in Bonn" if task == "tag" else "wo?\tAnna wohnt in Bonn"
    _, _, err = label(run, "--language", "de", text=f"{line}\n" * 3)
    done = {"tag": "labelled 1 of 3 sentences", "answer": "answered 1 of 3 questions"}[task]
    assert err.splitlines()[0] == f"lsmoe: {done}"


def test_what_cannot_be_labelled_is_refused(run, task, label):
    said = (
        ((), "name the language of the text: --language de"),
        (("--language", "sw"), "language 'sw' is not in this system: it knows de, en, fr"),
        (("--language", "de", "--route", "in"), "'in' is no route"),
    )
    for options, sentence in said:
        status, out, err = label(run, *options, text="Anna")
        assert (status, out) == (2, "") and sentence in err, err
    loaded = load(run)
    loaded.recipe.model.task = "translate"
    with pytest.raises(UserError, match="the task of the model is to translate: use `lsmoe translate`"):
        label_chunks(loaded, "de", [])


def test_a_language_that_was_not_trained_is_said(pool, base, task, label):
    recipe = recipe_of(base, task, steps=1)
    recipe.training.directions, recipe.training.checkpoint_every = ["de-de"], 1
    alone = trained(pool, recipe, base / f"alone-{task}")
    for code in LANGUAGES:
        notice.cache_clear()
        _, _, err = label(alone, "--language", code, text="\n")
        assert err == ("" if code == "de" else f"lsmoe: the model was not trained on {code} (zero-shot)\n")


@pytest.mark.parametrize(("start", "end", "wanted"), [(13, 18, (14, 18)), (14, 18, (14, 18)), (4, 4, (4, 4))])
def test_an_answer_has_no_spaces_around_it(start, end, wanted):
    """Tokens of XLM-R's tokenizer begin with the space before a word."""
    answer = Answer.at("Anna wohnt in Bonn und", 1.0, start, end)
    assert (answer.start, answer.end) == wanted and answer.text == "Anna wohnt in Bonn und"[slice(*wanted)]
