"""What the documentation says of keys, files and commands is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from pydantic import BaseModel
from support import PROJECT
from support.small_encoder import write_encoder
from support.small_host import write_host
from support.small_huggingface import write_nllb
from typer.core import TyperGroup
from typer.main import get_command

from lsmoe_ds.cli import app
from lsmoe_ds.config.file import load_recipe
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.section import is_section
from lsmoe_ds.convert.recipes import open_recipe
from lsmoe_ds.data.sources import SOURCES
from lsmoe_ds.study.settings import load_study


def keys(section: type[BaseModel], at: str = "") -> set[str]:
    """Return the keys of a section and of all sections in it.

    A key is prefixed only by the innermost section that contains it, for example ``batch.tokens``.
    """
    found = set()
    for name, field in section.model_fields.items():
        inner = is_section(field.annotation)
        found |= keys(inner, f"{name}.") if inner is not None and name != "corpora" else {f"{at}{name}"}
    return found


def test_every_key_of_a_recipe_is_documented():
    text = (PROJECT / "docs" / "recipe.md").read_text(encoding="utf-8")
    documented = {
        word.split(".")[-1]
        for cell in re.findall(r"^\| (.*?) \|", text, re.M)
        for word in re.findall(r"`([\w.]+)`", cell)
    }
    assert {key.split(".")[-1] for key in keys(Recipe)} - documented == set()


def test_every_source_is_documented():
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SOURCES)


def test_links_lead_somewhere():
    for page in [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *(PROJECT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_menu_of_the_site():
    text = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"([a-z_]+\.md)$", text, re.M))
    assert {page.name for page in (PROJECT / "docs").glob("*.md")} - listed == set()


def test_recipes_that_come_with_the_project_are_valid(tmp_path):
    recipes = sorted((PROJECT / "recipes").rglob("*.yaml"))
    assert recipes
    decoder = write_host(tmp_path / "decoder", max_position_embeddings=2048)
    encoder = write_encoder(tmp_path / "encoder", max_position_embeddings=514)
    for path in recipes:
        text = path.read_text(encoding="utf-8")
        host = encoder if "  task: " in text else decoder
        changes = [f"model.huggingface={host}"] if "huggingface:" in text else []
        assert load_recipe(path, changes).name == Path(path).stem


def test_yaml_of_the_documentation_is_valid(tmp_path, monkeypatch):
    """Whole recipes and studies are read as such; of others at least the syntax is right."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nllb-200-distilled-600M").mkdir()
    write_nllb(tmp_path / "nllb-200-distilled-600M")
    recipes, studies = [], []
    pages = {PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")}
    # Its second recipe starts from what its commands make: test_new_language.py runs the page.
    for page in sorted(pages - {PROJECT / "docs" / "new_language.md"}):
        for block in re.findall(r"^ *```ya?ml\n(.*?)```", page.read_text(encoding="utf-8"), re.S | re.M):
            value = yaml.safe_load(block)
            if isinstance(value, dict) and {"name", "data", "model", "training"} <= value.keys():
                (tmp_path / "recipe.yaml").write_text(block)
                recipes.append((page.name, open_recipe(tmp_path / "recipe.yaml")))
            elif isinstance(value, dict) and {"name", "recipe", "members"} <= value.keys():
                (tmp_path / "study.yaml").write_text(block.replace("../recipes", str(PROJECT / "recipes")))
                studies.append(load_study(tmp_path / "study.yaml"))
    assert {name for name, _ in recipes} >= {"convert.md", "data.md"} and studies


def test_options_in_shell_examples_exist():
    """Every option of a command in a shell example is one of its verb."""
    whole = get_command(app)
    for page in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]:
        for line in re.findall(r"lsmoe [^`\n]+(?:\\\n[^`\n]+)*", page.read_text(encoding="utf-8")):
            words = line.partition(" #")[0].replace("\\\n", " ").split()[1:]
            command = whole
            while words and isinstance(command, TyperGroup) and words[0] in command.commands:
                command = command.commands[words.pop(0)]
            if isinstance(command, TyperGroup) or command.name == "bench":
                continue
            known = {option for parameter in command.params for option in parameter.opts}
            for option in re.findall(r"(?<![\w-])--[a-z-]+", " ".join(words)):
                assert option in known | {"--help"}, f"{page.name}: lsmoe {command.name} has no {option}"


def test_the_picture_of_the_idea_shows_what_was_measured():
    measured = json.loads((PROJECT / "benchmarks/results/serve.json").read_text())["experts"]["128"]["models"]
    picture = (PROJECT / "docs/idea.svg").read_text(encoding="utf-8")
    for name in ("token, torch", "sub-network, torch", "sub-network, CTranslate2 int8"):
        for said in (
            f"{measured[name]['GiB on disk']:.2f} GiB",
            f"{measured[name]['peak tokens per second']:,.0f}",
        ):
            assert f">{said}<" in picture, f"{name}: {said}"
