"""What `lsmoe doctor` finds, and when it says that training cannot work."""

from __future__ import annotations

import json
import sys

import pytest

from lsmoe_ds import cli
from lsmoe_ds.launch import doctor
from lsmoe_ds.parallel import compat


def by_name(findings) -> dict:
    return {each.name: each for each in findings.findings}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def test_a_whole_environment_can_train(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsmoe", "doctor", "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = json.loads(capsys.readouterr().out)
    assert left.value.code == 0 and said["can_train"]
    found = {each["name"]: each for each in said["findings"]}
    assert found["deepspeed"]["verdict"] == "ok" and "kept" in found["locks"]["found"]
    assert found["this one"]["found"].startswith("started by no launcher")
    assert list(tmp_path.iterdir()) == []


def test_what_training_needs_and_what_it_can_do_without(monkeypatch):
    known = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda package: None if package in ("safetensors", "mpi4py") else known(package)
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda program: None)
    findings = doctor.examine()
    found = by_name(findings)
    assert (found["safetensors"].verdict, found["mpi4py"].verdict, found["srun"].verdict) == (
        "wrong",
        "missing",
        "missing",
    )
    assert "mpirun" in found["mpi4py"].found and not findings.can_train


def test_another_version_than_the_adapted_one_is_wrong(monkeypatch):
    monkeypatch.setattr(compat, "PINNED", {"deepspeed": "0.1"})
    findings = doctor.examine()
    assert by_name(findings)["versions"].verdict == "wrong" and not findings.can_train


def test_a_contradiction_is_told_once(monkeypatch):
    srun = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in {**srun, "WORLD_SIZE": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    findings = doctor.examine()
    assert by_name(findings)["this one"].found.startswith(
        "srun says that this is rank 0 of 4, but WORLD_SIZE is 8"
    )
    assert not findings.can_train
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert doctor.examine() is None


def test_an_interface_that_does_not_exist_is_wrong(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    assert by_name(doctor.examine())["network"].verdict == "wrong"
