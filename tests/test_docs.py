"""What the documentation says of keys, files and commands is there."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from lsmoe_ds.config import PROJECT, Recipe
from lsmoe_ds.data.sources import SOURCES
from lsmoe_ds.recipe_file import load_recipe
from lsmoe_ds.section import is_section


def keys(section: type[BaseModel], at: str = "") -> set[str]:
    """The last part of every key of a recipe, with its section."""
    found = set()
    for name, field in section.model_fields.items():
        inner = is_section(field.annotation)
        found |= keys(inner, f"{name}.") if inner is not None and name != "corpora" else {f"{at}{name}"}
    return found


def test_every_key_of_a_recipe_is_documented():
    text = (PROJECT / "docs" / "recipe.md").read_text(encoding="utf-8")
    documented = {word.split(".")[-1] for cell in re.findall(r"^\| (.*?) \|", text, re.M) for word in re.findall(r"`([\w.]+)`", cell)}
    assert {key.split(".")[-1] for key in keys(Recipe)} - documented == set()


def test_every_source_is_documented():
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in SOURCES)


def test_links_lead_somewhere():
    for page in [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *(PROJECT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recipes_that_come_with_the_project_are_valid():
    recipes = sorted((PROJECT / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).name == Path(path).stem
