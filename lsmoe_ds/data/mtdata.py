"""Fetch corpora of mtdata's index (``Statmt-news_commentary-16-deu-eng``) with the program ``mtdata``.

An identifier is GROUP-NAME-VERSION-LANGUAGE-LANGUAGE. Its output becomes a corpus like those of
:mod:`lsmoe_ds.data.sources`, with the publishers in ``references.bib``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.languages import normalize_code
from lsmoe_ds.notices import counted

# Groups begin with a capital; our own names never do.
IDENTIFIER = re.compile(r"[A-Z][\w.+]*-[^\s/-]+-[^\s/-]+-([a-z]{2,3}\w*)-([a-z]{2,3}\w*)")
LICENSE = "that of its publisher (references.bib)"
REFERENCES = "references.bib"


def is_identifier(name: str) -> bool:
    """Tell whether a name is the identifier of parallel text in mtdata's index."""
    return IDENTIFIER.fullmatch(name) is not None


def fetch(name: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """Write the bitext of an identifier into ``folder``; return its provenance.

    Raises UserError if the program ``mtdata`` is missing or fails, or if the sides have different numbers of
    lines.
    """
    program = shutil.which("mtdata")
    if program is None:
        raise UserError(
            f"{name} is fetched by the program mtdata, which is not installed: pip install mtdata (or, apart "
            "from this environment, pipx install mtdata)"
        )
    found = IDENTIFIER.fullmatch(name)
    assert found is not None
    version = _run([program, "--version"], name).split()
    languages = "-".join(found.groups())
    _run([program, "-no-pb", "get", "-l", languages, "-tr", name, "-o", str(scratch)], name)
    source, target = map(normalize_code, found.groups())
    sides = [scratch / "train-parts" / f"{name}.{code}" for code in found.groups()]
    if not all(side.is_file() for side in sides):
        raise UserError(f"mtdata has not written {sides[0].name} and {sides[1].name}: {name} was not fetched")
    bitext = Direction(source, target).bitext
    in_order = bitext.startswith(f"{source}-")
    pairs: Counter[str] = Counter()
    with (
        sides[0].open(encoding="utf-8", newline="\n") as first,
        sides[1].open(encoding="utf-8", newline="\n") as second,
        (folder / f"{bitext}.tsv").open("w", encoding="utf-8", newline="\n") as file,
    ):
        for left, right in zip_longest(first, second):
            if left is None or right is None:
                raise UserError(
                    f"{sides[0].name} and {sides[1].name} of mtdata have not equally many lines: remove "
                    f"mtdata's copy of {name} and fetch it again"
                )
            texts = [" ".join(side.split()) for side in ((left, right) if in_order else (right, left))]
            if all(texts):
                file.write("\t".join(texts) + "\n")
                pairs[bitext] += 1
    if not pairs:
        raise UserError(f"mtdata has found {counted(0, 'pair')} in {name}")
    if (scratch / REFERENCES).is_file():
        shutil.copyfile(scratch / REFERENCES, folder / REFERENCES)
    return {
        "package": name,
        "manager": "mtdata",
        "version": next((each for each in version if each[:1].isdigit()), "unknown"),
        "license": LICENSE,
        "pairs": dict(pairs),
    }


def _run(command: list[str], name: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = lines[-1] if lines else f"it left with status {done.returncode}"
        raise UserError(f"mtdata could not fetch {name}: {said}")
    return done.stdout + done.stderr
