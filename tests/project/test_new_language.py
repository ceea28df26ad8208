"""docs/new_language.md, run as it stands, with fewer steps and a smaller vocabulary."""

from __future__ import annotations

import io
import random
import re
import shlex
import subprocess
import sys

import pytest
from support import PROJECT
from support.commands import main

SMALL = {
    "size: 8000": "size: 136",
    "steps: 10000": "steps: 2",
    "steps: 3000": "steps: 2",
    "warmup: 1000": "warmup: 1",
}
MODEL = {"preset: transformer-tiny": "hidden: 16\n  heads: 2\n  encoder: {layers: 1, feed_forward: 16}"}
LETTERS = {"en": "abcdefgh", "de": "ijklmnop", "fr": "qrstuvwx", "nl": "efghijkl"}


def write_text(folder):
    """Write made sentences: a word is a row of syllables, spelled by the letters of its language."""
    chance = random.Random(1)
    for pair, lines in (("de-en", 150), ("en-fr", 150), ("en-nl", 90)):
        files = {code: (folder / f"{pair}.{code}").open("w", encoding="utf-8") for code in pair.split("-")}
        for _ in range(lines):
            words = [[chance.randrange(8) for _ in range(chance.randint(3, 6))] for _ in range(5)]
            for code, file in files.items():
                file.write(" ".join("".join(LETTERS[code][i] for i in word) for word in words) + "\n")
        for file in files.values():
            file.close()


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora").mkdir()
    write_text(tmp_path / "corpora")
    page = (PROJECT / "docs" / "new_language.md").read_text(encoding="utf-8")
    for name, text in zip(("base", "next"), re.findall(r"```yaml\n(.*?)```", page, re.S), strict=True):
        for old, new in {
            **SMALL,
            **MODEL,
            "  decoder:\n": "  decoder:\n    layers: 2\n    feed_forward: 16\n",
        }.items():
            text = text.replace(old, new)
        text = text.replace("size: 8008", "size: 144").replace(
            "  temperature", "  batch: {tokens: 256}\n  temperature"
        )
        (tmp_path / f"{name}.yaml").write_text(text.replace("    moe: {routing", "    moe: {routing"))
    for line in "".join(re.findall(r"```sh\n(.*?)```", page, re.S)).splitlines():
        given, _, command = line.rpartition(" | ")
        _, *words = shlex.split(command)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{given[6:-1]}\n".encode())))
        if words[0] == "train":  # ends its process
            train = [sys.executable, "-m", "lsmoe_ds", *words]
            done = subprocess.run(train, capture_output=True, text=True, timeout=300)
            status, said = done.returncode, done.stderr
        else:
            status, said = main(words), capsys.readouterr()
        assert status == 0, f"{line}: {said}"
    assert said.out.strip(), "the exported model translates into the new language"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ijk\n")))
    assert main(["translate", "runs/with-nl", "--from", "de", "--to", "nl"]) == 0
    assert "was not trained on de-nl" in capsys.readouterr().err
