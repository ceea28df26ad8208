"""`slurm/submit.sh` without a cluster: which jobs it submits, after which others."""

from __future__ import annotations

import pytest
from support.played_slurm import SLURM
from support.small_run import make_recipe


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(make_recipe(tmp_path, None, None).to_yaml())
    return file


def test_the_chain_has_its_dependencies(played, recipe):
    chosen = [
        "--nodes",
        "2",
        "--ntasks-per-node",
        "1",
        "--cpus-per-task",
        "3",
        "--array",
        "4",
        "--beam",
        "2",
        "--set",
        "training.steps=9",
    ]
    converted = ["--convert", "en-de", "--convert", "de-en:dense"]
    assert (
        played.run("submit.sh", str(recipe), *chosen, *converted, "--", "--time=9", "--gpus-per-node=8") == 0
    ), played.said
    train, evaluate, merge, first, second = played.calls("sbatch")
    assert (
        train == "--parsable --job-name=lsmoe-train --output=logs/%x-%j.out --nodes=2 --ntasks-per-node=1 "
        f"--cpus-per-task=3 --time=9 --gpus-per-node=8 {SLURM}/train.sbatch {recipe} --set "
        "training.steps=9 --out runs/small"
    )
    after, one = (
        "--dependency=afterok:{} --kill-on-invalid-dep=yes --output=logs/%x-%j.out --cpus-per-task=3",
        f"{SLURM}/",
    )
    assert (
        evaluate
        == f"--parsable --job-name=lsmoe-evaluate {after.format(101)} --output=logs/%x-%A_%a.out --array=1-4 "
        f"{one}evaluate.sbatch runs/small --beam 2"
    )
    assert (
        merge
        == f"--parsable --job-name=lsmoe-merge {after.format(102)} {one}merge.sbatch runs/small 4 --beam 2"
    )
    assert (
        first
        == f"--parsable --job-name=lsmoe-convert-en-de {after.format(101)} {one}convert.sbatch runs/small en "
        "de ctranslate2 runs/small-en-de-ctranslate2"
    )
    assert second.endswith("convert.sbatch runs/small de en dense runs/small-de-en-dense")
    rows = [line.split() for line in played.said.splitlines()[1:6]]
    assert rows == [["101", "train", "-"], ["102", "evaluate", "101"], ["103", "merge", "102"]] + [
        [str(104 + i), f"convert-{direction}", "101"] for i, direction in enumerate(("en-de", "de-en"))
    ]
    assert "scancel 101 102 103 104 105" in played.said and (played.folder / "logs").is_dir()


def test_only_asked_nothing_is_submitted(played, recipe):
    assert played.run("submit.sh", str(recipe), "--test-only", "--convert", "en-de") == 0, played.said
    assert len(played.calls("sbatch")) == 4 and all(
        call.startswith("--test-only ") for call in played.calls("sbatch")
    )
    assert not (played.folder / "logs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "--nodes is '0': it should be a whole number from 1 on"),
        (["--array"], "--array is '': it should be"),
        (["--convert", "en"], "--convert is 'en': it should be A-B or A-B:KIND"),
        (["--convert", "en-de:onnx"], "--convert is 'en-de:onnx'"),
        (["--out"], "--out lacks its value"),
        (["--node", "2"], "there is no option --node"),
        (["other.yaml"], "'other.yaml' is one recipe too many"),
        (["--set", "parallel.tensor=3"], "tensor"),
        (["--nodes", "3", "--ntasks-per-node", "1"], "multiple of 3"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_submitted(played, recipe, arguments, said):
    assert played.run("submit.sh", str(recipe), *arguments) == 2
    assert said in played.said and len(played.said.splitlines()) == 1 and not played.calls("sbatch")


def test_without_lsmoe_nothing_is_submitted_and_its_environment_is_asked_for(played, recipe):
    (played.folder / "programs" / "lsmoe").unlink()
    path = f"{played.folder / 'programs'}:/usr/bin:/bin"
    assert played.run("submit.sh", str(recipe), PATH=path) == 2
    assert played.said.startswith("lsmoe: lsmoe is not found: activate the environment that has it")
    assert len(played.said.splitlines()) == 1 and not played.calls("sbatch")


def test_half_a_chain_is_taken_back(played, recipe):
    assert (
        played.run("submit.sh", str(recipe), "--nodes", "1", "--ntasks-per-node", "1", REFUSED="merge.sbatch")
        == 2
    )
    assert played.calls("scancel") == ["101 102"] and "none is left in the queue" in played.said
