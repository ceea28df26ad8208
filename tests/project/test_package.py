"""An installed package, which is no checkout, has all that it needs, and finds it by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROJECT
from support.small_encoder import write_encoder
from support.small_host import write_host

from lsmoe_ds import __version__, cli, shipped
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.study.settings import load_study

LOAD_ALL = """
import json, lsmoe_ds
from lsmoe_ds import shipped
from lsmoe_ds.launch import slurm
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.study.settings import load_study
from pathlib import Path
recipes = [load_recipe(name).name for name in shipped.names("recipe")]
studies = [load_study(name).settings.name for name in shipped.names("study")]
names = shipped.names("DeepSpeed configuration")
configs = [load_recipe("demo", [f"deepspeed={name}"]).deepspeed for name in names]
slurm.copy_scripts(Path("scripts"))
print(json.dumps({"at": lsmoe_ds.__file__, "recipes": recipes, "studies": studies, "configs": len(configs)}))
"""


@pytest.mark.slow
def test_a_wheel_has_all_that_a_checkout_has(tmp_path):
    source, place, here = tmp_path / "source", tmp_path / "place", tmp_path / "here"
    here.mkdir()
    # Which some recipes are for.
    write_host(here / "data/models/smollm2", max_position_embeddings=2048)
    for folder in ("models/xlm-roberta-base", "data/models/small-xlm-r"):
        write_encoder(here / folder, max_position_embeddings=514)
    for name in ("lsmoe_ds", "recipes", "studies", "ds_configs", "slurm"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(PROJECT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    subprocess.run(
        [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path],
        cwd=source,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] == __version__
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", place, wheel], check=True)
    files = {path.relative_to(source) for path in (source / "lsmoe_ds").rglob("*") if path.is_file()}
    assert sorted(str(file) for file in files if not (place / file).is_file()) == []
    shutil.rmtree(source)

    environment = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["at"]).is_relative_to(place)
    assert len(found["recipes"]) == len(list((PROJECT / "recipes").rglob("*.yaml")))
    assert len(found["studies"]) == len(list((PROJECT / "studies").glob("*.yaml")))
    assert found["configs"] == len(list((PROJECT / "ds_configs").glob("*.json")))
    scripts = {path.name: path.stat().st_mode & 0o111 for path in (here / "scripts").iterdir()}
    assert scripts == {path.name: path.stat().st_mode & 0o111 for path in (PROJECT / "slurm").iterdir()}
    assert not list(place.rglob("demo.py"))

    command = [sys.executable, "-m", "lsmoe_ds", "plan", "recipes/demo.yaml", "--json"]
    planned = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert planned.returncode == 0 and json.loads(planned.stdout)["name"] == "demo"
    assert re.fullmatch(
        r"lsmoe: there is no file recipes/demo\.yaml here: taking the recipe that .*/demo\.yaml\n",
        planned.stderr,
    )


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "recipes/demo.yaml"])
def test_a_shipped_recipe_by_its_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name).name == "demo"
    assert (
        f"there is no file {name} here: taking the recipe that comes with lsmoe_ds" in capsys.readouterr().err
    )
    assert load_recipe("papers/iwslt14-lms").name == "iwslt14-lms"
    assert load_study("lms").settings.name == load_study("studies/lms.yaml").settings.name == "lms"
    zero2 = json.loads((PROJECT / "ds_configs/zero2.json").read_text())
    assert [
        load_recipe("demo", [f"deepspeed={each}"]).deepspeed
        for each in ("zero2", "zero2.json", "ds_configs/zero2.json")
    ] == [zero2] * 3


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (PROJECT / "recipes/demo.yaml").read_text()
    Path("demo").write_text(text.replace("name: demo", "name: mine"))
    assert load_recipe("demo").name == "mine" and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["dmeo", "../recipes/demo", "/recipes/demo.yaml", "x" * 5000, "a\0b", ""])
def test_what_does_not_come_with_lsmoe_ds_is_not_found(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("recipe", name) is None


def test_an_unknown_name_lists_what_there_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lsmoe", "plan", "dmeo"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith(
        "lsmoe: there is no recipe dmeo: give a file, or one that comes with lsmoe_ds: demo, help-12"
    )


def test_scripts_do_not_replace_edited_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lsmoe", "slurm", "scripts", str(tmp_path)])
    (tmp_path / "site.sh").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert (tmp_path / "site.sh").read_text() == "mine" and "not empty" in capsys.readouterr().err
