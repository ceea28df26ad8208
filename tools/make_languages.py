"""Write lsmoe_ds/languages.tsv and docs/languages.md: ``python tools/make_languages.py``.

Names, scripts, main regions and ISO 639 codes are those of CLDR and of IANA's registry, as the libraries
langcodes and language_data (MIT licence) hold them. tools/languages.tsv has what no library knows: the codes
that this project uses, their families, other codes in use, and the names and scripts that differ from CLDR's.
The table is written to a file and not looked up at run time because the codes are part of trained models, as
tags of their vocabularies: they must not change with a library's version.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS, TABLE, PAGE = ROOT / "tools/languages.tsv", ROOT / "lsmoe_ds/languages.tsv", ROOT / "docs/languages.md"
COLUMNS = ("code", "script", "region", "family", "name", "own", "aliases")
SPECIAL = {"und", "mul", "zxx", "mis", "root"}
# CLDR's predominant member of a macrolanguage where FLORES-200 and this table choose another one.
OTHER_CHOICE = {"fuc", "quz", "pbu"}

Row = dict[str, str]


def read_ours() -> list[Row]:
    """Read tools/languages.tsv."""
    with OURS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def make_table() -> list[Row]:
    """Return all rows: the project's own, every language whose script CLDR knows, and scripts that a region
    implies.
    """
    from langcodes.data_dicts import LANGUAGE_REPLACEMENTS, LIKELY_SUBTAGS

    likely = {key: tuple(value.split("-")) for key, value in LIKELY_SUBTAGS.items()}
    rows = {row["code"]: _own_row(row, likely) for row in read_ours()}
    claimed = {alias for row in rows.values() for alias in row["aliases"].split(",")}
    known = {code.split("_")[0] for code in rows} | claimed | LANGUAGE_REPLACEMENTS.keys() | SPECIAL
    for code, subtags in likely.items():
        if "-" not in code and code not in known:
            region = subtags[2] if subtags[2] != "ZZ" else ""
            rows[code] = dict(zip(COLUMNS, (code, subtags[1], region, "", _name(code), "", ""), strict=True))
    _add_scripts_of_regions(rows, likely, claimed)
    for alias, language in _iso_aliases():
        row = rows.get(language) or rows.get({"zh": "zh_Hans"}.get(language, ""))
        if row is not None and alias not in rows and alias not in claimed:
            _add_alias(row, alias)
    for row in rows.values():
        row["own"] = ",".join(_own_names(row))
    return sorted(rows.values(), key=lambda row: row["code"].lower())


def _own_row(own: Row, likely: dict[str, tuple[str, ...]]) -> Row:
    language, *parts = own["code"].split("_")
    subtags = likely.get(own["code"].replace("_", "-")) or likely.get(language) or ("", "", "")
    script = own["script"] or next((part for part in parts if len(part) == 4 and part.istitle()), subtags[1])
    region = own["region"] or ("" if parts and "-".join([language, *parts]) not in likely else subtags[2])
    region = "" if region == "ZZ" or own["code"].endswith(f"_{region}") else region
    name = own["name"] or _name(language)
    return dict(
        zip(COLUMNS, (own["code"], script, region, own["family"], name, "", own["aliases"]), strict=True)
    )


def _name(code: str) -> str:
    """CLDR's English name."""
    from language_data.name_data import CODE_TO_NAMES

    return str(CODE_TO_NAMES[code]["en"])


def _own_names(row: Row) -> list[str]:
    """Return CLDR's names of a language in the language itself, under any of its codes."""
    from language_data.name_data import CODE_TO_NAMES

    found: dict[str, None] = {}
    for code in (row["code"], *filter(None, row["aliases"].split(","))):
        names = CODE_TO_NAMES.get(code.replace("_", "-"), {})
        found |= dict.fromkeys(
            filter(None, (names.get(code.replace("_", "-")), names.get(code.split("_")[0])))
        )
    return [name for name in found if "," not in name]


def _add_alias(row: Row, alias: str) -> None:
    row["aliases"] = ",".join(sorted({*filter(None, row["aliases"].split(",")), alias}))


def _add_scripts_of_regions(
    rows: dict[str, Row], likely: dict[str, tuple[str, ...]], claimed: set[str]
) -> None:
    """Make ``uz_AF`` an alias of ``uz_Arab``, with a row of its own: another script is written in that
    region.
    """
    for key, subtags in likely.items():
        language, _, region = key.partition("-")
        row = rows.get({"zh": "zh_Hans"}.get(language, language))
        alias, code = f"{language}_{region}", f"{language}_{subtags[1]}"
        if (
            len(region) != 2
            or row is None
            or row["script"] in ("", subtags[1])
            or alias in claimed | rows.keys()
        ):
            continue
        if code not in rows:
            name = f"{row['name']} ({subtags[1]})"
            rows[code] = dict(zip(COLUMNS, (code, subtags[1], "", row["family"], name, "", ""), strict=True))
        _add_alias(rows[code], alias)


def _iso_aliases() -> Iterable[tuple[str, str]]:
    """Yield (other code, code) of ISO 639-3 and -2/B, of deprecated codes (``zh_cmn_hant`` too), and of the
    main members of macrolanguages.
    """
    from langcodes import data_dicts as data

    for codes in (data.LANGUAGE_ALPHA3, data.LANGUAGE_ALPHA3_BIBLIOGRAPHIC):
        yield from ((alias, code) for code, alias in codes.items())
    for codes in (data.LANGUAGE_REPLACEMENTS, data.NORMALIZED_MACROLANGUAGES):
        yield from (
            (alias.replace("-", "_"), code.replace("-", "_"))
            for alias, code in codes.items()
            if ("-" in alias or "-" not in code) and alias not in OTHER_CHOICE
        )


def render_table(rows: list[Row]) -> str:
    """Return the text of lsmoe_ds/languages.tsv."""
    lines = ["\t".join(COLUMNS), *("\t".join(row[column] for column in COLUMNS) for row in rows)]
    return "\n".join(lines) + "\n"


PAGE_HEAD = """# Languages

<!-- Written by tools/make_languages.py from tools/languages.tsv and CLDR: change these, not this page. -->

A language has one code here, the first column. Write it, or any other code for the same language, wherever a code is read:
in recipes and studies, in the names of files and the headers of columns, on the command line. What is read as another code
is said in one line on standard error (`lsmoe: language 'deu_Latn' is read as 'de' (German), 'fra' as 'fr' (French)`), and
recipes are stored with the codes of this page.

| convention | examples |
|---|---|
| ISO 639-1, 639-3, 639-2/B | `de`, `deu`, `ger` |
| FLORES-200, NLLB | `deu_Latn`, `zho_Hans`, `arb_Arab` |
| M2M-100, mBART-50 | `__de__`, `zh`, `ns`, `en_XX` |
| BCP 47 and locales | `de-DE`, `zh-TW`, `zh-CHT`, `zh-Hant-HK`, `en_GB`, `sr@latin`, `es-419` |
| NTREX-128 | `zho-TW`, `srp-Latn`, `por-BR` |
| withdrawn codes | `iw` (`he`), `in` (`id`), `mo` (`ro`) |

Upper and lower case are the same. The rules:

- The script that a language is usually written in is left out, and so is its main region: `jpn_Jpan` and `ja-JP` are `ja`.
  Any other script or region makes a variety of its own, which has the language's family and, but for another script, its
  script: `kk_Arab`, `es_MX`, `fr_CA`. Only English has no regions: `en_US` and `en_GB` are `en`.
- `zh` is `zh_Hans`, `zh-TW` is `zh_Hant`, `pt-PT` is `pt`, and `pt-BR` stays `pt_BR`. `no` (Norwegian, either
  kind) and `nb` (Bokmål) are two codes, but text of one serves the other where a corpus has only one of them.
- In a direction the two codes are separated by a hyphen: `en-zh_Hant`. Hyphens within a code are understood where regions and
  scripts are written in capitals (`en-zh-TW`, `pt-BR-en`); otherwise write underscores.
- Two codes for one language in one recipe (`de` and `deu`) are refused.
- A code that is not on this page is accepted if it is written like one (`qaa`, `xx`, `x_mine`): it has no name, its text is not
  filtered by script, and BLEU splits words by `13a`. A notice says so.
- A run keeps the codes that it was trained with, as they are in its vocabulary. To continue a run from before codes were
  resolved, train with its own recipe: `lsmoe train RUN/recipe.yaml`.

The script decides which letters cleaning accepts and how BLEU splits the target; related languages share experts by family
(`expert_groups`, `routing: static`).
"""


def render_page(rows: list[Row]) -> str:
    """Return the text of docs/languages.md."""
    own, others = ([row for row in rows if bool(row["family"]) == wanted] for wanted in (True, False))
    parts = [PAGE_HEAD, f"## {len(own)} languages with a family\n", _markdown(own, COLUMNS)]
    about = (
        f"## {len(others)} more languages\n\nTheir families are not known here: in groups of tasks they come "
        "last, by code.\n"
    )
    return "\n".join([*parts, about, _markdown(others, [column for column in COLUMNS if column != "family"])])


def _markdown(rows: list[Row], columns: Iterable[str]) -> str:
    head = ["code", *(column for column in columns if column != "code")]
    titles = {"region": "main region", "own": "own name", "aliases": "also read"}
    lines = [f"| {' | '.join(titles.get(column, column) for column in head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        aliases = ", ".join(f"`{alias}`" for alias in row["aliases"].split(",") if alias)
        cells = {**row, "code": f"`{row['code']}`", "own": row["own"].replace(",", ", "), "aliases": aliases}
        lines.append(f"| {' | '.join(cells[column] for column in head)} |")
    return "\n".join(lines) + "\n"


def read_table() -> list[Row]:
    """Read lsmoe_ds/languages.tsv."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def main() -> None:
    """Write both files; say which codes mean two languages."""
    rows = make_table()
    meanings: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for alias in filter(None, row["aliases"].split(",")):
            meanings[alias.lower()].add(row["code"])
    if double := {alias: codes for alias, codes in meanings.items() if len(codes) > 1}:
        sys.exit(f"these codes are aliases of two languages: {double}")
    TABLE.write_text(render_table(rows), encoding="utf-8")
    PAGE.write_text(render_page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
