"""Write a multi-way set in the layout of FLORES-101: the same help sentences of an office suite in twelve
languages.

    lsmoe data fetch libreoffice-help
    python recipes/help_multiway.py          # writes data/corpora/help-multiway/dev and devtest

For studies of many-to-many fine-tuning: the base (recipes/help-12-base.yaml) never sees these sentences;
`dev` then trains, `devtest` is scored. Sentences have 5 to 20 English words and end with a full stop.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

LANGUAGES = ("de", "fr", "it", "zh_Hans", "nl", "ja", "ko", "gl", "eu", "om", "km")
SIZES = {"dev": 997, "devtest": 100}  # the first as in FLORES-101
WORDS = range(5, 21)


def read(folder: Path) -> dict[str, dict[str, str]]:
    """Return each English sentence with its first translation into each language."""
    found: dict[str, dict[str, str]] = {}
    for code in LANGUAGES:
        (path,) = [*folder.glob(f"{code}-en.tsv"), *folder.glob(f"en-{code}.tsv")]
        english = path.stem.split("-").index("en")
        for line in path.read_text(encoding="utf-8").splitlines():
            pair = line.split("\t")
            if len(pair) == 2:
                found.setdefault(pair[english], {}).setdefault(code, pair[1 - english])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of fetched corpora")
    corpora = parser.parse_args().data / "corpora"
    texts = read(corpora / "libreoffice-help")
    whole = sorted(
        english
        for english, others in texts.items()
        if len(others) == len(LANGUAGES)
        and len(english.split()) in WORDS
        and english.endswith(".")
        and len({english, *others.values()}) == len(LANGUAGES) + 1  # no two languages have the same text
    )
    random.Random(1).shuffle(whole)
    for split, size in SIZES.items():
        chosen, whole = whole[:size], whole[size:]
        folder = corpora / "help-multiway" / split
        folder.mkdir(parents=True, exist_ok=True)
        for code in ("en", *LANGUAGES):
            lines = [english if code == "en" else texts[english][code] for english in chosen]
            (folder / f"{code}.{split}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{folder}: {len(chosen)} sentences in {len(LANGUAGES) + 1} languages")


if __name__ == "__main__":
    main()
