"""Read MediaWiki's interface messages in 24 languages, line by line: those of text and placeholders of names.

They are the sentences of silver_names.py.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import regex

from lsmoe_ds.data.archives import Members, opened
from lsmoe_ds.data.catalogues import read_messages, without_wiki_markup
from lsmoe_ds.data.readers import Messages
from lsmoe_ds.data.sources import LICENSES, check_source, download
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import sha256

TABLE = Path(__file__).with_name("silver_names.tsv")


@dataclass(frozen=True)
class Language:
    """A language of the corpus: faker's locale, its methods for places, and the sentences to train on."""

    locale: str
    places: str
    train: int = 2000
    family_first: bool = False
    spaced: bool = True  # whether spaces separate words; otherwise each character is a token, as in WikiANN
    messages: str = ""  # MediaWiki's code, where it is another one


# Sizes are in three tiers, as WikiANN's are. A method is listed only if the locale has its own names for it.
LANGUAGES = {
    "en": Language("en_US", "city state country street_name"),
    "de": Language("de_DE", "city_name state country street_name"),
    "nl": Language("nl_NL", "city province country street_name"),
    "sv": Language("sv_SE", "city state country street_name"),
    "fr": Language("fr_FR", "city region department_name country street_name"),
    "es": Language("es_ES", "city region country street_name"),
    "it": Language("it_IT", "city state country street_name"),
    "pt": Language("pt_PT", "city_name administrative_unit country street_name"),
    "cs": Language("cs_CZ", "city_name state country"),
    "pl": Language("pl_PL", "city region"),
    "ru": Language("ru_RU", "city_name region country"),
    "el": Language("el_GR", "city region country", train=1000),
    "hu": Language("hu_HU", "city county country street_name", train=1000, family_first=True),
    "fi": Language("fi_FI", "city_name state country street_name", train=1000),
    "fa": Language("fa_IR", "state country", train=1000),
    "id": Language("id_ID", "city state country", train=1000),
    "vi": Language("vi_VN", "city_name administrative_unit", train=1000, family_first=True),
    "th": Language("th_TH", "city_name province country", train=1000, spaced=False),
    "hy": Language("hy_AM", "city village state country", train=100),
    "az": Language("az_AZ", "city district village country", train=100),
    "bn": Language("bn_BD", "city town administrative_unit country", train=100),
    "ja": Language("ja_JP", "city town prefecture country", family_first=True, spaced=False),
    "ko": Language("ko_KR", "city province country", family_first=True),
    "zh": Language(
        "zh_CN", "city_name province district country", family_first=True, spaced=False, messages="zh-hans"
    ),
}
SPLITS = {"train": 5, "dev": 1, "test": 1}  # shares of the messages, and of the names

SITE = "S"  # the placeholder that {{SITENAME}} becomes
ENGLISH_WORDS = 5  # a message without names has at least as many and ends with a full stop
LONGEST = 40  # tokens

GENDER = re.compile(r"\{\{GENDER:[^|{}]*\|?([^{}]*)\}\}", re.IGNORECASE)
PLACEHOLDER = re.compile(rf"\$([\d{SITE}])")
# Markup, other variables, and what without_wiki_markup leaves of pages: Special:Log, User:$1.
LEFT_OUT = regex.compile(r"[<>&{}\[\]|\\_=]|\$(?![\dS](?!\d))|//|(?<!\$)\p{L}:[\p{L}$]|\$[\dS][@/*#]|[/@]\$")
# Real names would be tagged as none. The translations name a wiki where the English text does not.
REAL = regex.compile(
    r"\b(?:MediaWiki|Wiki(?:base|data|media|pedia|editor)|Google|Commons|Commonwealth|United States|Italian"
    r"|Nazi|Act|GNU|Microsoft|Mozilla|OATHAuth|ReCaptcha)\b|Vikipe|Wikipe|Wikimed|[Вв]икип|[Вв]ікіп|Βικιπ|Վիքիպ"
    r"|ویکی.?پدیا|উইকিপি|วิกิพี|ウィキ[ペメ]|维基[百媒]|위키[백미]",
    regex.IGNORECASE,
)
LETTER = regex.compile(r"[\p{L}\p{M}]")
WORD = regex.compile(  # d'Anna and dell'Arte are two words
    r"(?i:[cdjlmnst]|qu|jusqu|lorsqu|puisqu|un|all|dall|dell|nell|sull|quell|quest)['’](?=\p{L}|$)"
    r"|(?:\p{L}{1,3}\.){2,}|['’]t(?!\p{L})"  # S.A.S., van 't Riet
    r"|[\w\p{M}]+(?:[-'’\u200c][\w\p{M}]+)*|\X"
)
CHARACTER = regex.compile(r"\X")

Parts = list[str]  # text, placeholder's kind and number, text, ...: "", "user 1", " moved ", "page 3", ""
Message = tuple[Parts, Parts]  # for men and for women, whose verbs differ in some languages


def words(text: str, language: Language) -> list[str]:
    """Split text into WikiANN's tokens: words and marks, or characters where no spaces separate words."""
    found = (WORD if language.spaced else CHARACTER).findall(text)
    return [token for token in found if not token.isspace()]


def read_table(path: Path = TABLE) -> dict[str, dict[str, str]]:
    """Return what each placeholder of a message stands for, by the message's key."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {key: dict(pair.split("=") for pair in kinds.split()) for key, kinds in rows}


@contextmanager
def package_members(package: Path | None) -> Iterator[tuple[Members, dict[str, str]]]:
    """Yield the members of the Debian package (a file, a folder, or None to download it) and its checksum."""
    if package is not None and package.is_dir():
        paths = sorted(path for path in package.rglob("*") if path.is_file())
        yield {path.relative_to(package).as_posix(): path.read_bytes for path in paths}, {}
        return
    with tempfile.TemporaryDirectory() as scratch:
        if package is None:
            (archive,) = download(check_source("mediawiki"), Path(scratch))
        else:
            if not package.is_file():
                raise UserError(f"there is no Debian package or folder {package}")
            archive = Path(scratch) / package.name  # it is unpacked beside its place
            archive.symlink_to(package.resolve())
        with opened(archive, re.compile(f"{LICENSES}|{Messages.members.pattern}")) as members:
            yield members, {archive.name: sha256(archive)}


def read_texts(members: Members, package: Path | None) -> dict[str, dict[str, str]]:
    """Return the messages by language and key; those of the API and the installer are left out."""
    codes = {language.messages or code: code for code, language in LANGUAGES.items()}
    texts: dict[str, dict[str, str]] = {code: {} for code in LANGUAGES}
    for name, read in members.items():
        path = PurePosixPath(name)
        if path.parent.name == "i18n" and path.stem in codes and not {"api", "installer"} & set(path.parts):
            try:
                messages = read_messages(read())
            except ValueError as error:
                raise UserError(f"{name} is damaged: {error}") from None
            texts[codes[path.stem]] = messages | texts[codes[path.stem]]
    if not texts["en"]:
        raise UserError(
            f"no English messages of MediaWiki were found in {package or 'the package'} (.../i18n/en.json)"
        )
    return texts


def read_parts(line: str, kinds: dict[str, str], language: Language, gender: int) -> Parts | None:
    """Return the parts of one line of a message; None if it holds anything but text and names."""

    def form(match: re.Match[str]) -> str:
        forms = match.group(1).split("|")
        return forms[gender] if gender < len(forms) else forms[0]

    text = GENDER.sub(form, line).replace("{{SITENAME}}", f"${SITE}")
    if re.search(r"[<>&{}]", text):
        return None
    text = without_wiki_markup(text)
    if LEFT_OUT.search(text) or REAL.search(text):
        return None
    parts = PLACEHOLDER.split(text)
    for index in range(1, len(parts), 2):
        if parts[index] not in kinds:
            return None
        # "$1s" would tear a word apart. Korean writes its particles so.
        if language.spaced and language.locale != "ko_KR":
            before, after = parts[index - 1][-1:], parts[index + 1][:1]
            if LETTER.match(before) or LETTER.match(after):
                return None
        parts[index] = f"{kinds[parts[index]]} {parts[index]}"
    return parts


def read_language(
    code: str, texts: dict[str, dict[str, str]], table: dict[str, dict[str, str]]
) -> dict[str, list[Message]]:
    """Return the usable lines of a language's messages, by key."""
    language = LANGUAGES[code]
    found: dict[str, list[Message]] = defaultdict(list)
    for key, english in sorted(texts["en"].items()):
        text = texts[code].get(key, english if code == "en" else "")
        kinds = {**table.get(key, {}), SITE: "site"}
        plain = key not in table and "{{SITENAME}}" not in english
        if not text or REAL.search(english) or (code != "en" and text == english):
            continue
        if plain and not (len(english.split()) >= ENGLISH_WORDS and re.search(r"[.!?]$", english)):
            continue
        for line in text.split("\n"):
            men, women = (read_parts(line, kinds, language, gender) for gender in (0, 1))
            if men and women and is_sentence(men, plain, language):
                found[key].append((men, women))
    return found


def is_sentence(parts: Parts, plain: bool, language: Language) -> bool:
    """Tell whether a line has a name exactly if its message should, and a length that suits."""
    text = "".join(parts[::2])
    length = len(words(text, language))
    shortest = 4 if plain and language.spaced else 1
    return (len(parts) == 1) == plain and shortest <= length <= LONGEST and bool(LETTER.search(text))


def form_of(parts: Parts) -> str:
    """Return the text of a line to compare it: without capitals, marks, and kinds of placeholders."""
    return regex.sub(r"[\W_]+", " ", " 0 ".join(parts[::2])).casefold()


def deal_messages(corpus: dict[str, dict[str, list[Message]]], seed: int) -> dict[str, str]:
    """Return the split of each key. Keys whose text is the same in any language share one."""
    leader = {key: key for lines in corpus.values() for key in lines}

    def find(key: str) -> str:
        while leader[key] != key:
            key = leader[key]
        return key

    for lines in corpus.values():
        first: dict[str, str] = {}
        for key, messages in lines.items():
            for message in messages:
                for parts in message:
                    other = first.setdefault(form_of(parts), key)
                    leader[find(key)] = find(other)
    clusters: dict[str, list[str]] = defaultdict(list)
    for key in sorted(leader):
        clusters[find(key)].append(key)
    # Each split gets its share of each combination of kinds.
    kinds: dict[str, str] = {}
    for lines in corpus.values():
        for key, messages in lines.items():
            kinds.setdefault(find(key), " ".join(sorted(part.split()[0] for part in messages[0][0][1::2])))
    order = sorted(clusters)
    random.Random(f"{seed} messages").shuffle(order)
    order.sort(key=lambda cluster: (kinds[cluster], len(clusters[cluster]) < 3))  # large ones train
    cycle = ["train", "dev", "train", "test", "train", "train", "train"]  # SPLITS, as evenly as they go
    return {key: cycle[n % len(cycle)] for n, cluster in enumerate(order) for key in clusters[cluster]}
