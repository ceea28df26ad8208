"""Rooms import each other without circles, only the rooms of methods name methods, and tests mirror rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support import PROJECT

PACKAGE, TESTS = PROJECT / "lsmoe_ds", PROJECT / "tests"
OTHER_TESTS = {"command_line", "gpu", "project", "slurm", "support"}
NAMES = re.compile(
    r"(?i)(?<![a-z])(clsr|low[-_]rank|lms|neurons|lass|fuse(_distillation| distillation)?)(?![a-z_])"
)
# What may name a method outside its room, and why.
ALLOWED = {
    "analysis/neurons.py": "lsmoe analyze neurons is for models of any method",
    "cli_analyze.py": "names that command",
    "cli.py": "names of a study and of a benchmark in help texts",
    "config/moe.py": "moe.fuse_distillation is a key of experts, beside which the shared feed-forward stands",
    "config/method.py": "the registry",
    "model/methods.py": "the registry: what a model is trained on",
    "export/tokenizer.py": "Fuse is a decoder of the tokenizers library",
}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules of lsmoe_ds that a file imports when it runs, not only for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for each in block.body
        for node in ast.walk(each)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in only_types:
            if node.module == "lsmoe_ds":
                yield from (f"lsmoe_ds.{alias.name}" for alias in node.names)
            elif node.module.startswith("lsmoe_ds."):
                yield node.module


def names_of_rooms() -> set[str]:
    return {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_rooms_import_those_below_them_only():
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```\n(study\n.*?)```", page, re.S)
    height = {room: -number for number, line in enumerate(lines.splitlines()) for room in line.split(" · ")}
    rooms = names_of_rooms() - {"shipped"}
    assert rooms == height.keys()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        for other in {module.split(".")[1] for module in imports_of(path)} & rooms - {room}:
            assert room not in rooms or height[other] < height[room], (
                f"{path} imports {other}, which is not below {room}"
            )


def test_only_their_rooms_name_methods():
    found = {}
    for path in sorted(PACKAGE.rglob("*")):
        name = str(path.relative_to(PACKAGE))
        if path.suffix not in (".py", ".html") or name.startswith("methods/"):
            continue
        if lines := [line for line in path.read_text(encoding="utf-8").splitlines() if NAMES.search(line)]:
            found[name] = lines
    assert found.keys() == ALLOWED.keys(), found


def test_tests_of_a_room_lie_in_a_folder_of_its_name():
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/*.py")}
    assert folders >= OTHER_TESTS and folders - OTHER_TESTS <= names_of_rooms()
    assert {path.name for path in TESTS.glob("*.py")} == {"conftest.py"}
    assert not list((TESTS / "support").rglob("test_*.py"))


def test_no_test_module_is_imported():
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any(part.startswith("test_") for name in names for part in name.split(".")), (
                    f"{path} imports {names}: what several tests use belongs in tests/support"
                )
