"""Standard streams that are closed, full, read by nobody or in another encoding; options before a verb;
benchmarks.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from click import Command
from support import PROJECT
from support.commands import main
from typer.main import get_command

from lsmoe_ds import __version__
from lsmoe_ds.cli import app
from lsmoe_ds.launch import benchmark

BENCHMARKS = [path for path in sorted(PROJECT.glob("benchmarks/*.py")) if "def main(" in path.read_text()]
PROGRAM = "from lsmoe_ds.console import run_command; run_command(lambda: print(chr(246) + chr(26085)))"
SHELL = "{environment} exec {python} -c '" + PROGRAM + "' {redirect}"
COMPLAINING = """
import sys
from rich.console import Console
from lsmoe_ds.console import run_command

def complain():
    print("a line", file=sys.stderr, flush=True)
    Console(stderr=True).print("another one")
    print("done")

run_command(complain)
"""
COMMAND = "exec {python} -m lsmoe_ds {arguments} {redirect}"


def shell(command: str, **parts: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a shell; output is buffered, as by default."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    line = command.format(**{"python": sys.executable, "environment": "", **parts})
    return subprocess.run(["bash", "-c", line], capture_output=True, env=environment, cwd=PROJECT)


def test_output_is_utf8_whatever_the_locale():
    done = shell(SHELL, environment="PYTHONUTF8=0 PYTHONIOENCODING=latin-1", redirect="")
    assert (done.stdout, done.returncode) == ("ö日\n".encode(), 0), done.stderr


@pytest.mark.parametrize(
    ("command", "redirect", "says"),
    [
        (SHELL, "> /dev/full", b"standard output cannot be written: No space left on device"),
        (SHELL, ">&-", b"standard output is closed"),
        (COMMAND, "> /dev/full", b"standard output cannot be written: No space left on device"),
    ],
)
def test_output_that_goes_nowhere_is_one_sentence(command, redirect, says):
    done = shell(command, redirect=redirect, arguments="--help")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(b"lsmoe: ") and says in done.stderr


def test_closed_output_is_told_before_the_work():
    done = shell(COMMAND, redirect=">&-", arguments="evaluate there-is-no-such-run")
    assert done.returncode == 2 and done.stderr.startswith(b"lsmoe: standard output is closed"), done.stderr


@pytest.mark.parametrize("redirect", ["2> /dev/full", "2>&-", "2> >(exit)"])
def test_standard_error_that_goes_nowhere_ends_nothing(redirect):
    done = shell("exec {python} -c '" + COMPLAINING + "' {redirect}", redirect=redirect)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_closed_input_is_one_sentence():
    done = shell(COMMAND, arguments="translate run --direction en-de", redirect="<&-")
    assert (
        done.returncode == 2
        and done.stderr.startswith(b"lsmoe: standard input is closed")
        and done.stderr.count(b"\n") == 1
    )


@pytest.mark.parametrize("redirect", ["2>&-", "<&- 2>&-", ">&- 2>&-"])
def test_what_is_printed_to_a_closed_stream_is_no_signal(redirect):
    """The pipe of signals must not get the number of a closed stream: a newline there reads as SIGUSR1,
    status 75.
    """
    done = shell(COMMAND, arguments="plan missing.yaml", redirect=redirect)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_a_reader_that_leaves_ends_the_command_silently():
    done = shell("set -o pipefail; ({python} -m lsmoe_ds --help; echo $? >&2) | true")
    assert done.stderr == b"141\n"


def test_the_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "run", "--as", "de", "--out", "x"], "a language goes into --direction"),
        (["convert", "run", "--to", "dense", "--out", "x"], "--to is a language, as in .*: write --as dense"),
        (["convert", "run", "--out", "x"], "add --as with consolidated, grown, "),
        (
            ["convert", "run", "--as", "dense", "--out", "x", "--from", "en"],
            "--from and --to name a direction together",
        ),
        (
            ["convert", "run", "--as", "dense", "--out", "x", "--direction", "en-de", "--from", "en"],
            "leave out --from and --to",
        ),
        (
            ["convert", "run", "--as", "dense", "--out", "x", "--direction", "de-de"],
            "'de-de' is not a direction",
        ),
        (["translate", "run", "--from", "en"], "--from and --to name a direction together"),
        (["translate", "run"], "name the languages: --from en --to de, or --direction en-de"),
        (
            ["translate", "run", "--direction", "en-de", "--beam", "2", "--n-best", "3"],
            "3 best translations are wanted of a beam of 2: choose from 1 to 2, or a larger beam",
        ),
    ],
)
def test_languages_of_a_verb(arguments, says, capsys):
    assert main(arguments) == 2
    assert re.search(says, capsys.readouterr().err)


def commands(command: Command) -> Iterator[Command]:
    for inner in getattr(command, "commands", {}).values():
        yield from (inner, *commands(inner))


@pytest.mark.parametrize("command", list(commands(get_command(app))), ids=lambda command: command.name)
def test_every_option_is_explained_in_plain_words(command):
    for parameter in (each for each in command.params if not getattr(each, "hidden", False)):
        said = parameter.help or ""
        assert len(said.split()) > 2 and not re.match(r"(Of|With|Without) ", said), parameter.name


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda script: script.stem)
def test_every_benchmark_has_the_shared_options_and_explains_its_own(script):
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    assert any(getattr(call.func, "id", "") == "argument_parser" for call in calls)
    written = {ast.unparse(call.args[-1]) for call in calls if getattr(call.func, "id", "") == "write"}
    assert written and written <= {"arguments.out", "out"}
    for call in calls:
        if getattr(call.func, "attr", "") == "add_argument":
            assert "help" in [keyword.arg for keyword in call.keywords], ast.unparse(call)


def test_a_benchmark_gets_the_options_after_its_name(capsys, monkeypatch):
    called: list[list[str]] = []
    process = MagicMock()
    process.__enter__.return_value.wait.return_value = 0
    monkeypatch.setattr(
        benchmark.subprocess, "Popen", lambda command, **options: called.append(command) or process
    )
    assert main(["bench", "foo"]) == 2
    said = capsys.readouterr().err
    assert "peers" not in said and "common" not in said and "exports" in said
    assert main(["bench", "--help"]) == 0 and "exchange" in capsys.readouterr().out and called == []
    assert (
        main(["bench", "exchange", "--help"])
        == main(["bench", "exchange", "--rounds", "3", "--out", "r.json"])
        == 0
    )
    assert [command[2:] for command in called] == [["--help"], ["--rounds", "3", "--out", "r.json"]]
    assert {Path(command[1]) for command in called} == {PROJECT / "benchmarks" / "exchange.py"}


def test_a_benchmarks_result_is_printed_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    import common

    common.write({"rate": 3}, common.argument_parser("About.").parse_args([]).out)
    printed = json.loads(capsys.readouterr().out)
    common.write(
        {"rate": 3}, common.argument_parser("About.").parse_args(["--out", str(tmp_path / "r.json")]).out
    )
    assert (
        printed == json.loads((tmp_path / "r.json").read_text())
        and printed["rate"] == 3
        and "torch" in printed["machine"]
    )
    with pytest.raises(SystemExit):
        common.argument_parser("About.").parse_args(["--out", str(tmp_path / "none" / "r.json")])
    assert not [
        path.name for path in Path(PROJECT, "benchmarks").glob("*.py") if '/ "results"' in path.read_text()
    ]
