"""Hooks of mkdocs: add the pages that are generated from the code, and the files that pages link to.

`make docs` builds the site. Pages of ``docs/`` are also read in a checkout, where they link to files of the
project (``../recipes/demo.yaml``). On the site each such file is a page below ``files/``.
"""

from __future__ import annotations

import dataclasses
import inspect
import posixpath
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup
from typer.main import get_command

import lsmoe_ds
from lsmoe_ds import api
from lsmoe_ds.cli import app
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.section import is_section
from lsmoe_ds.inference.translate import Translation

PROJECT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash", ".tsv": "text"}
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
MOST = 200_000  # bytes of a file that is shown


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, the pages of the project's root, and every file that a page links to."""
    pages = {
        "reference/commands.md": commands_page(),
        "reference/keys.md": keys_page(),
        "reference/api.md": api_page(),
        **{name.lower(): (PROJECT / name).read_text(encoding="utf-8") for name in ROOT_PAGES},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    linked: set[str] = set()
    for file in files.documentation_pages():
        folder = "" if file.src_uri in map(str.lower, ROOT_PAGES) else "docs"
        linked |= {path for path in targets(file.content_string, folder) if not is_in_site(path)}
    for path in sorted(linked):
        if (PROJECT / path).is_file() and path not in ROOT_PAGES and path != "README.md":
            files.append(File.generated(config, f"files/{path}.md", content=file_page(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files outside ``docs/`` to their pages; a link to a folder is an error."""
    name = page.file.src_uri
    if name.startswith("files/"):
        return markdown
    at_root = name in map(str.lower, ROOT_PAGES)

    def replace(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join("" if at_root else "docs", posixpath.dirname(name), target))
        if path in ROOT_PAGES:
            new = path.lower()
        elif path == "README.md":
            new = "index.md"
        elif is_in_site(path):
            new = path.removeprefix("docs/")
        elif (PROJECT / path).is_file():
            new = f"files/{path}.md"
        else:
            raise PluginError(f"{name} links to {target}, which is no file: name one in it")
        return f"]({posixpath.relpath(new, posixpath.dirname(name) or '.')}{anchor})"

    return LINK.sub(replace, markdown)


def is_in_site(path: str) -> bool:
    """Tell whether a file of the project is itself in the site: a page or a picture of ``docs/``."""
    return path.startswith("docs/") and Path(path).suffix in (".md", ".png", ".svg")


def targets(text: str, folder: str) -> Iterator[str]:
    """Yield the files of the project that a page in ``folder`` links to."""
    for match in LINK.finditer(text):
        if "://" not in match[1]:
            yield posixpath.normpath(posixpath.join(folder, match[1]))


def file_page(path: str) -> str:
    """Return a page that shows a file of the project."""
    text = (PROJECT / path).read_text(encoding="utf-8")[:MOST]
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=2) + 1)
    fence = max(fence, "```")
    kind = FENCE.get(Path(path).suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n{fence}{kind}\n{text}\n{fence}\n"


def commands_page() -> str:
    """Return the page of all commands with their options, from the command line's own help."""
    parts = ["# Commands\n", "Each command answers `--help` with the same text.\n"]
    for words, command in walk(get_command(app), ["lsmoe"]):
        usage = " ".join(part for part in (*words, *arguments(command)) if part)
        parts += [f"\n## `{' '.join(words)}`\n", f"    {usage}\n", paragraphs(command.help or "")]
        rows = [row for row in map(option_row, command.params) if row]
        if rows:
            parts += ["| option | default | |\n|---|---|---|", *rows, ""]
    return "\n".join(parts)


def walk(command: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Yield the commands that do something, with their words."""
    if isinstance(command, TyperGroup):
        for name, each in sorted(command.commands.items()):
            if not each.hidden:
                yield from walk(each, [*words, name])
    else:
        yield words, command


def arguments(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield metavar(parameter)


def metavar(argument: Any) -> str:
    """Return an argument as usage lines show it."""
    name = argument.metavar or argument.name.upper()
    name += "..." if argument.nargs == -1 and not name.endswith("...") else ""
    return name if argument.required else f"[{name}]"


def option_row(parameter: Any) -> str:
    """Return the row of an option or argument; empty for those that need none."""
    if parameter.param_type_name == "argument":
        return f"| `{metavar(parameter)}` | | {cell(parameter.help)} |" if parameter.help else ""
    if parameter.hidden or parameter.name == "help":
        return ""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    return f"| {names} | {shown} | {cell(parameter.help)} |"


def cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def paragraphs(text: str) -> str:
    """Return a docstring as Markdown: code in double back quotes becomes code, references become names."""
    text = inspect.cleandoc(text).replace("``", "`")
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text) + "\n"


def keys_page() -> str:
    """Return the page of all keys of a recipe, by their whole paths, as `--set` takes them."""
    parts = [
        "# Recipe keys\n",
        "Each key by its whole path, as `--set PATH=VALUE` takes it. [The recipe](../recipe.md) says what "
        "they mean. `encoder` stands for `decoder`, too.\n",
    ]
    for path, section in sections(Recipe, ""):
        rows = []
        for name, field in section.model_fields.items():
            if inner(field.annotation) is not None:
                continue
            default = field.get_default(call_default_factory=True)
            shown = (
                "required" if default is PydanticUndefined else f"`{default}`" if default is not None else ""
            )
            rows.append(
                f"| `{path}{name}` | `{type_name(field.annotation)}` | {cell(shown)} |".replace("`None`", "")
            )
        if rows:
            title = path.removesuffix(".") or "recipe"
            about = paragraphs(section.__doc__) if section.__doc__ else ""
            parts += [f"\n## `{title}`\n", about, "| key | value | default |\n|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def inner(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, if it holds one."""
    found = is_section(annotation)
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


def sections(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield the sections of a recipe by their paths; decoder and encoder are alike."""
    yield path, section
    for name, field in section.model_fields.items():
        held = inner(field.annotation)
        if held is not None and name != "decoder":
            yield from sections(held, f"{path}{name}.")


def type_name(annotation: Any) -> str:
    """Return a type as a reader of recipes would write it."""
    origin, inside = typing.get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return type_name(inside[0])
    if origin is typing.Literal:
        return " or ".join(map(str, inside))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(each) for each in inside if each is not type(None))
    if origin in (tuple, list):
        kinds = [type_name(each) for each in inside if each is not Ellipsis]
        return f"[{', '.join(dict.fromkeys(kinds))}, ...]"
    if origin is not None and len(inside) == 2:
        return f"{{{type_name(inside[0])}: {type_name(inside[1])}}}"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}
    name = getattr(annotation, "__name__", "any")
    return names.get(name, name.lower())


def api_page() -> str:
    """Return the page of the Python interface, from its signatures and docstrings."""
    parts = ["# Python reference\n", paragraphs(api.__doc__ or "")]
    for name in sorted(set(lsmoe_ds.__all__) - {"__version__"}):
        found = getattr(lsmoe_ds, name)
        parts += [f"\n## `lsmoe_ds.{name}`\n", *described(f"lsmoe_ds.{name}", found)]
        if name == "load":
            for each, method in vars(api.Model).items():
                if not each.startswith("_"):
                    parts += [f"\n### `Model.{each}`\n", *described(f"model.{each}", method)]
            fields = ", ".join(f"`{each.name}` ({each.type})" for each in dataclasses.fields(Translation))
            parts += [f"\n### `Translation`\n\nFields: {fields}.\n", paragraphs(Translation.__doc__ or "")]
    return "\n".join(parts)


def described(name: str, found: Any) -> list[str]:
    if isinstance(found, property):
        return [paragraphs(found.__doc__ or "")]
    if not inspect.isfunction(found):
        return []
    # annotations are strings, which are shown in quotes
    signature = re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(found)).replace("self, ", ""))
    return [f"```python\n{name}{signature}\n```\n", paragraphs(found.__doc__ or "")]
