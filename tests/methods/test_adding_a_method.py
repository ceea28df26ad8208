"""The example of docs/adding_a_method.md goes through all that lsmoe does, and nothing else names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support import PROJECT
from support.small_run import make_recipe, write_corpus

from lsmoe_ds.checkpoint.stored import find_model, read_weights

METHODS = PROJECT / "docs" / "methods"
PART = "contract_output_bias"


# A process that has imported everything, the example's method too, and forks one for each piece of code.
SERVER = """
import json, os, sys
from support.workers import PRELOAD
for name in PRELOAD:
    __import__(name)
for line in sys.stdin:
    code, arguments, output = json.loads(line)
    child = os.fork()
    if not child:
        for stream, path in ((0, os.devnull), (1, output + ".out"), (2, output + ".err")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = arguments
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Return a function that runs code with the example's folder, and returns what it printed."""
    output = tmp_path_factory.mktemp("example") / "output"
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = {**os.environ, "LSMOE_METHODS": str(METHODS), "PYTHONPATH": paths}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as server:  # fmt: skip
        assert server.stdin is not None and server.stdout is not None

        def run(code: str, *arguments: str | Path) -> str:
            print(json.dumps([code, [*map(str, arguments)], str(output)]), file=server.stdin, flush=True)
            status = server.stdout.readline().strip()
            said = output.with_suffix(".err").read_text()
            assert status == "0", f"{' '.join(map(str, arguments))}\n{said[-3000:]}"
            return output.with_suffix(".out").read_text()

        yield run


@pytest.fixture(scope="module")
def lsmoe(example):
    """Return a function that runs the command with the example's folder, and returns what it printed."""
    return lambda *arguments: example("from lsmoe_ds.__main__ import main; main()", "lsmoe", *arguments)


@pytest.fixture(scope="module")
def weights_of(example):
    """Return a function that reads weights and masks as the example's own processes do."""
    code = (
        "import sys, torch; from lsmoe_ds.checkpoint.stored import find_model, read_weights; "
        "torch.save(dict(read_weights(find_model(sys.argv[1])).tensors), sys.argv[2])"
    )

    def read(folder: Path) -> dict[str, torch.Tensor]:
        out = folder.parent / "weights.pt"
        example(code, "weights", folder, out)
        return torch.load(out)

    return read


def losses(run: Path) -> dict[int, list[float]]:
    """Return loss, gradient norm and the method's metric of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        each["step"]: [each[name] for name in ("loss", "grad_norm", "bias_square")]
        for each in records
        if "loss" in each
    }


def halfway(run: Path, copy: Path) -> Path:
    """Copy a run as it was after its second step."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-4")
    return copy


@pytest.fixture(scope="module")
def trained(lsmoe, tmp_path_factory) -> Path:
    """Train four steps, with checkpoints after the second and the last, and return the run."""
    folder = tmp_path_factory.mktemp("method")
    write_corpus(folder)
    recipe = yaml.safe_load(make_recipe(folder, None, None).to_yaml())
    recipe["model"]["output_bias"] = {"weight": 0.5}
    recipe["training"] |= {"steps": 4, "log_every": 1, "checkpoint_every": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lsmoe("data", "prepare", folder / "recipe.yaml")
    lsmoe("train", folder / "recipe.yaml", "--out", folder / "run")
    return folder / "run"


def test_training_follows_the_schedule_the_mask_and_the_loss(trained, weights_of):
    weights = weights_of(trained)
    rows, mask = (
        weights[f"decoder.0.feed_forward.{PART}.rows"],
        weights[f"decoder.0.feed_forward.{PART}.mask"],
    )
    assert rows.shape == (3, 16) and mask.shape == (16,) and 0 < mask.sum() < 16
    assert rows[:, mask > 0].any() and not rows[:, mask == 0].any()
    squares = [each[2] for each in losses(trained).values()]
    # In the first step the scale is 0 and the rows are: only from the second one on a gradient reaches them.
    assert squares[:2] == [0, 0] and squares[2] > 0
    assert sum(PART in name for name in weights) == 2 * 3


def test_it_resumes_to_the_bit_and_reshards(trained, lsmoe, weights_of, tmp_path):
    resumed = halfway(trained, tmp_path / "resumed")
    lsmoe("train", resumed / "recipe.yaml", "--out", resumed)
    assert losses(resumed) == losses(trained)
    spread = halfway(trained, tmp_path / "spread")
    lsmoe("train", spread / "recipe.yaml", "--set", "parallel.tensor=2", "--out", spread)
    for step, found in losses(spread).items():
        assert found == pytest.approx(losses(trained)[step], rel=1e-4), step
    whole, other = weights_of(trained), weights_of(spread)
    assert whole.keys() == other.keys()
    apart = {
        name: float((whole[name].float() - other[name].float()).abs().max())
        for name in whole
        if not name.endswith("key.bias")
    }  # these have no gradient
    assert max(apart.values()) < 1e-4, apart


def test_a_plan_counts_it(trained, lsmoe, weights_of):
    planned = json.loads(lsmoe("plan", trained / "recipe.yaml", "--json"))
    weights = weights_of(trained)
    assert planned["parameters"]["total"] == sum(
        each.numel() for name, each in weights.items() if not name.endswith(".mask")
    )
    assert planned["parameters"]["total"] - planned["serving"]["total"] == 3 * 3 * 16


def test_it_grows_by_a_language(trained, lsmoe, weights_of, tmp_path):
    grown = tmp_path / "grown"
    settings = ["--set", "data.languages=[de,fr,nl]", "--like-language", "de"]
    lsmoe("convert", trained, "--as", "grown", *settings, "--out", grown)
    before, after = (weights_of(each)[f"decoder.1.feed_forward.{PART}.rows"] for each in (trained, grown))
    assert after.shape == (4, 16)
    assert torch.equal(after[:3], before) and not after[3].any()  # de, en, fr, and nl, which begins as drawn


def test_it_is_added_to_a_trained_model(trained, lsmoe, weights_of, tmp_path):
    """The model without it, as `lsmoe convert` leaves it, grows by the method and computes what it did."""
    dense, grown = tmp_path / "dense", tmp_path / "grown"
    lsmoe("convert", trained, "--as", "dense", "--from", "en", "--to", "de", "--out", dense)
    lsmoe("convert", dense, "--as", "grown", "--set", "model.output_bias.weight=0.5", "--out", grown)
    added = weights_of(grown)
    assert not added[f"decoder.0.feed_forward.{PART}.rows"].any()
    assert added[f"decoder.0.feed_forward.{PART}.mask"].tolist() == [i % 4 > 0 for i in range(16)]


@pytest.mark.parametrize("kind", ["dense", "huggingface"])
def test_it_merges_into_a_dense_model(trained, lsmoe, tmp_path, kind):
    """``lsmoe convert`` itself compares the logits and translations of both."""
    lsmoe("convert", trained, "--as", kind, "--from", "en", "--to", "de", "--out", tmp_path / kind)
    (record,) = [json.loads(path.read_text()) for path in (trained / "conversions").glob(f"{kind}*.json")]
    assert (
        record["largest_logit_difference"] < 1e-4 and record["same_translations"] == record["sentences"] > 0
    )
    stored = find_model(tmp_path / kind)  # needs the example no more
    assert not any(PART in name for name in read_weights(stored).tensors)


def test_the_report_tells_of_it(trained, lsmoe):
    lsmoe("report", trained)
    page = (trained / "report.html").read_text()
    assert "an output bias of each target language" in page and "Mean square of the output biases" in page


def test_no_other_file_names_it():
    found = subprocess.run(
        ["git", "grep", "-l", "output_bias"], cwd=PROJECT, capture_output=True, text=True
    ).stdout.split()
    assert [path for path in found if not path.startswith(("docs/", "tests/"))] == []
    assert len((METHODS / "output_bias.py").read_text().splitlines()) <= 80


SECTION = """
from lsmoe_ds.config.method import MethodSection
from lsmoe_ds.config.shapes import LinearShape

class Wrong(MethodSection):
    name = "wrong"
    rank: int = 1
"""
CHECK = "    def check(self, model):\n        {}\n"
TOO_WIDE = CHECK.format("raise ValueError('too wide')")
BESIDE = "    def is_at(self, site):\n        return isinstance(site, LinearShape)\n"
OF_WRONG = "'model.wrong': its check fails: AttributeError: 'Model' object has no attribute 'width'"
# Of a file: its name, its text, what is set of the recipe, and the sentence.
FAULTS = {
    "no section": ("wrong.py", "x = 1\n", "rank=1", "wrong.py defines 0 sections of a recipe"),
    "no Python": (
        "wrong.py",
        "x = \n",
        "rank=1",
        "cannot be imported: SyntaxError",
    ),
    "another name": ("other.py", SECTION, "rank=1", "its name must be that of the file, 'other'"),
    "one of ours": ("low_rank.py", SECTION, "rank=1", "cannot be a method: there is another 'low_rank'"),
    "a module of ours": (
        "base.py",
        SECTION,
        "rank=1",
        "lsmoe_ds has a module of this name",
    ),
    "another key": ("wrong.py", SECTION, "rang=1", "unknown key 'model.wrong.rang' (did you mean 'rank'?)"),
    "misfit": (
        "wrong.py",
        SECTION + CHECK.format("raise ValueError('too wide')"),
        "rank=1",
        "'model.wrong': too wide",
    ),
    "a fault": ("wrong.py", SECTION + CHECK.format("model.width"), "rank=1", OF_WRONG),
    "no file": ("_wrong.py", SECTION, "rank=1", "methods of your own are found by LSMOE_METHODS"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_method_are_one_sentence(fault, tmp_path):
    file, text, change, sentence = FAULTS[fault]
    (tmp_path / file).write_text(text)
    said = refusal(tmp_path, f"model.wrong.{change}")
    assert sentence in said and len(said.splitlines()) == 1


def test_a_linear_layer_takes_one_method(tmp_path):
    (tmp_path / "wrong.py").write_text(SECTION + BESIDE)
    said = refusal(tmp_path, "model.wrong.rank=1", "--set", "model.low_rank.rank=2")
    assert (
        "'low_rank' and 'wrong' both stand beside encoder.0.feed_forward.expand: a linear layer takes one"
        in said
    )


def refusal(folder: Path, change: str, *more: str) -> str:
    """Return what ``lsmoe plan`` says when it refuses."""
    command = [sys.executable, "-m", "lsmoe_ds", "plan", "prose-8", "--set", change, *more]
    environment = {**os.environ, "LSMOE_METHODS": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=PROJECT)
    said = [line for line in done.stderr.splitlines() if "taking the recipe" not in line]
    assert done.returncode == 2, done.stderr
    return "\n".join(said)
