"""Write a corpus for named-entity recognition in WikiANN's layout: interface messages with invented names.

    python -m pip install '.[names]'         # faker
    python recipes/silver_names.py           # writes data/corpora/silver-names/de/train, dev and test, ...

The labels are silver: nobody annotated them. The sentences are real messages of MediaWiki in 24 languages,
from the Debian package `mediawiki`, which apt-get downloads unless `--package` names it (see
silver_messages.py). The names are invented: they come from `faker`, in the language's own locale. A user in a
message becomes a person (PER), the site an organization (ORG), a page a place (LOC), an organization or a
person. silver_names.tsv says by key what each placeholder stands for, after MediaWiki's notes for translators
(qqq.json); lines with any other are left out.

No message is in two splits, in any language, nor are two messages of the same text. Within a language no name
is in two splits. Scores compare methods on names in short sentences of an interface; they are no measure of
reading prose.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import regex
from silver_messages import (
    LANGUAGES,
    SPLITS,
    Message,
    deal_messages,
    package_members,
    read_language,
    read_table,
    read_texts,
    words,
)

from lsmoe_ds.data.sources import LICENSES, PROVENANCE
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import describe_files, locked, replaced, write_json

if TYPE_CHECKING:
    from faker import Faker

HELD_OUT = 300  # sentences of dev, and of test
CLASSES = ("PER", "ORG", "LOC")
KINDS = {  # what a placeholder stands for: the classes that are drawn for it, evenly
    "user": ["PER"],
    "site": ["ORG"],
    "page": ["LOC"] * 4 + ["ORG"] * 2 + ["PER"],
}
FILLINGS = 16  # of one message in one language, at most
NAMED = 0.8  # share of sentences that hold a name
POOL = 2500  # names of each class

Sentence = list[tuple[str, str]]  # tokens with their tags
Name = tuple[str, int]  # with the gender, 0 or 1, of a person


class Names:
    """Names of one locale by split and class. No name is in two of them."""

    def __init__(self, code: str, seed: int) -> None:
        self.language = LANGUAGES[code]
        self.faker = new_faker(self.language.locale, seed)
        self.random = random.Random(f"{seed} names {code}")
        makers: dict[str, Callable[[], Name]] = {
            "LOC": self._place,
            "ORG": self._company,
            "PER": self._person,
        }
        # A place of this name alone could not be told from a person.
        self.surnames = {family().casefold() for family in self._families for _ in range(POOL)}
        self.dealt: dict[tuple[str, str], list[Name]] = {}
        taken: set[str] = set()
        for kind, make in makers.items():
            found: dict[str, int] = {}
            for _ in range(POOL):
                name, gender = make()
                name = " ".join(name.replace("ي", "ی").replace("ك", "ک").split())  # Arabic letters in Persian
                if self._suits(name, kind) and name.casefold() not in taken:
                    taken.add(name.casefold())
                    found[name] = gender
            names = list(found.items())
            self.random.shuffle(names)
            total, start = sum(SPLITS.values()), 0
            for split, share in SPLITS.items():
                end = start + len(names) * share // total
                self.dealt[split, kind] = names[start:end]
                start = end

    def draw(self, split: str, kind: str, gender: int, others: Sequence[str]) -> str:
        """Return a name that the sentence does not hold yet; a person's has the given gender."""
        fitting = [
            name
            for name, its_gender in self.dealt[split, kind]
            if name not in others and (kind != "PER" or its_gender == gender)
        ]
        return self.random.choice(fitting)

    def _person(self) -> Name:
        gender = self.random.randrange(2)
        sex = ("male", "female")[gender]
        given = [getattr(self.faker, f"first_name_{sex}")() for _ in range(2)]
        family = self._families[gender]()
        joint = "" if self.language.locale in ("ja_JP", "zh_CN", "ko_KR") else " "
        pattern = self.random.random()
        if pattern < 0.2:
            return given[0], gender
        if pattern < 0.35 and len(family) > 1:  # Kim alone is no name to be called by
            return family, gender
        if pattern < 0.45 and joint:
            given[0] = " ".join(given)
        pair = (family, given[0]) if self.language.family_first else (given[0], family)
        return joint.join(pair), gender

    @property
    def _families(self) -> list[Callable[[], str]]:
        """Return what makes the surnames of men and of women."""
        return [getattr(self.faker, f"last_name_{sex}", self.faker.last_name) for sex in ("male", "female")]

    def _company(self) -> Name:
        return self.faker.company(), 0

    def _place(self) -> Name:
        methods = self.language.places.split()
        weights = [2 if method.startswith("city") else 1 for method in methods]
        return str(getattr(self.faker, self.random.choices(methods, weights)[0])()), 0

    def _suits(self, name: str, kind: str) -> bool:
        """Tell whether faker's name is one: neither abbreviated nor in other letters nor glued together."""
        marks = r"[\d()\[\]/_;:$]" if kind == "ORG" else r"[\d()\[\]/_;:$.,]"
        if regex.search(rf"{marks}|\p{{Lu}}{{3,}}\p{{Ll}}|\p{{Ll}}\p{{Lu}}", name):
            return False
        if not self.language.spaced and regex.search(r"\p{Latin}", name):
            return False
        if kind != "ORG":
            return len(name.split()) <= 5 and (kind == "PER" or name.casefold() not in self.surnames)
        # A surname alone, as some locales call a company, cannot be told from a person.
        alone = len(name.split()) == 1 and self.language.spaced and self.language.locale != "fa_IR"
        return not alone and len(name.split()) <= 8


def new_faker(locale: str, seed: int) -> Faker:
    """Return a seeded faker of a locale. Raises UserError if the package is missing."""
    try:
        from faker import Faker
    except ImportError:
        raise UserError("silver_names needs the package faker: python -m pip install '.[names]'") from None
    faker = Faker(locale)
    for provider in faker.providers:
        # it_IT makes its list of cities of a set, whose order differs from process to process.
        if isinstance(cities := getattr(provider, "cities", None), list):
            provider.cities = sorted(cities)
    faker.seed_instance(f"{seed} {locale}")
    return faker


def fill(message: Message, key: str, turn: int, names: Names, split: str, seed: int) -> Sentence:
    """Return the tokens and tags of one filling. Its classes and genders are the same in all languages."""
    gender = random.Random(f"{seed} {key} {turn}").randrange(2)
    chosen: dict[str, str] = {}
    tokens: Sentence = []
    for index, part in enumerate(message[gender]):
        if index % 2 == 0:
            tokens += [(token, "O") for token in words(part, names.language)]
            continue
        kind = random.Random(f"{seed} {key} {turn} {part}").choice(KINDS[part.split()[0]])
        if part not in chosen:
            chosen[part] = names.draw(split, kind, gender, list(chosen.values()))
        for n, token in enumerate(words(chosen[part], names.language)):
            tokens.append((token, f"{'I' if n else 'B'}-{kind}"))
    return tokens


def make_split(
    lines: dict[str, list[Message]], split: str, size: int, names: Names, seed: int
) -> list[Sentence]:
    """Return the sentences of one split of a language, shuffled; fewer than ``size`` if messages are few."""
    order = random.Random(f"{seed} {split} {names.language.locale}")
    named: list[tuple[str, Message]] = []
    plain: list[tuple[str, Message]] = []
    for key, messages in sorted(lines.items()):
        for message in messages:
            (named if len(message[0]) > 1 else plain).append((key, message))
    order.shuffle(named)
    order.shuffle(plain)
    wanted = round(size * NAMED)
    sentences: list[Sentence] = []
    seen: set[str] = set()
    for turn in range(FILLINGS):
        for key, message in named:
            tokens = fill(message, key, turn, names, split, seed)
            text = " ".join(token for token, _ in tokens)
            if len(sentences) < wanted and text not in seen:
                seen.add(text)
                sentences.append(tokens)
    for key, message in plain[: size - wanted]:
        sentences.append(fill(message, key, 0, names, split, seed))
    order.shuffle(sentences)
    return sentences


def write_split(path: Path, code: str, sentences: list[Sentence]) -> Counter[str]:
    """Write a split in WikiANN's layout; return its numbers of sentences and of names by class."""
    counts: Counter[str] = Counter(sentences=len(sentences))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for sentence in sentences:
            file.writelines(f"{code}:{token}\t{tag}\n" for token, tag in sentence)
            file.write("\n")
            counts.update(tag[2:] for _, tag in sentence if tag.startswith("B-"))
    return counts


def write_corpus(package: Path | None, out: Path, seed: int) -> None:
    """Write the whole corpus in place of ``out``, with its README, licence and provenance."""
    new_faker("en_US", seed)  # before anything is fetched
    import faker

    table = read_table()
    with package_members(package) as (members, archives):
        texts = read_texts(members, package)
        licenses = {read(): None for name, read in members.items() if re.fullmatch(LICENSES, name)}
    if not licenses:
        raise UserError("the package of MediaWiki holds no licence text (usr/share/doc/mediawiki/copyright)")
    corpus = {code: read_language(code, texts, table) for code in LANGUAGES}
    split_of = deal_messages(corpus, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out), replaced(out) as new:
        counts: dict[str, dict[str, Counter[str]]] = {}
        for code, lines in corpus.items():
            if not lines:
                continue
            (new / code).mkdir()
            names, counts[code] = Names(code, seed), {}
            for split in SPLITS:
                size = LANGUAGES[code].train if split == "train" else HELD_OUT
                own = {key: messages for key, messages in lines.items() if split_of[key] == split}
                sentences = make_split(own, split, size, names, seed)
                counts[code][split] = write_split(new / code / split, code, sentences)
            print(f"{out / code}: {', '.join(f'{split} {describe(n)}' for split, n in counts[code].items())}")
        rows = [f"{key}\t{split}\n" for key, split in sorted(split_of.items())]
        (new / "messages.tsv").write_text("".join(rows), encoding="utf-8")
        (new / "LICENSE").write_bytes(b"\n\n".join(licenses))
        (new / "README.md").write_text(README.format(seed=seed, faker=faker.VERSION), encoding="utf-8")
        files = [path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()]
        provenance = {
            "name": "silver-names",
            "labels": "silver: placeholders of messages, filled with invented names",
            "package": "mediawiki",
            "archives": archives,
            "license": "GPL-2.0-or-later",
            "names": f"faker {faker.VERSION}",
            "seed": seed,
            "counts": counts,
            "files": describe_files(new, files),
        }
        write_json(new / PROVENANCE, provenance)


def describe(counts: Counter[str]) -> str:
    return f"{counts['sentences']} ({' '.join(f'{kind} {counts[kind]}' for kind in CLASSES)})"


README = """# silver-names

Named entities in WikiANN's layout: `CODE/train`, `CODE/dev` and `CODE/test` hold lines `CODE:token<TAB>tag`
and an empty line after each sentence. Tags: O, B-PER, I-PER, B-ORG, I-ORG, B-LOC, I-LOC.

**These are silver data: nobody annotated them.** The sentences are interface messages of MediaWiki. Their
placeholders are filled with names that faker {faker} makes up or takes from its lists (seed {seed}); no
person, company or street is meant. The tags follow from the placeholders. `messages.tsv` says which message
is in which split: none is in two, in any language. Within a language no name is in two either.

Weaknesses:

- There are few wordings and many names.
- Names are in their citation form, also where the language would inflect them.
- Most organizations have a legal form in their name (GmbH, Ltd), which makes them easy.
- A page may be a place, an organization or a person, so that there only the name itself tells the class.
- The sizes of the training sets are chosen: 2,000 sentences, 1,000 or 100.

Use them to compare methods on this corpus. They are no measure of reading prose.

The text is MediaWiki's, under the GNU General Public License, version 2 or later: see LICENSE.
`PROVENANCE.json` has the package, the counts and checksums.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("data"), help="the folder of fetched corpora")
    parser.add_argument(
        "--out", type=Path, help="the corpus (default: corpora/silver-names in the directory)"
    )
    parser.add_argument("--package", type=Path, help="the Debian package mediawiki: its file, or unpacked")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    out = arguments.out or arguments.directory / "corpora" / "silver-names"
    try:
        write_corpus(arguments.package, out, arguments.seed)
    except UserError as error:
        print(f"silver_names: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
