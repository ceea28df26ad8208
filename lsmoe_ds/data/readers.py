"""Read pairs from the members of an archive: catalogues, MediaWiki's messages, and translated documents."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from lsmoe_ds.data.archives import Members
from lsmoe_ds.data.catalogues import read_catalogue, read_messages, without_tags, without_wiki_markup
from lsmoe_ds.data.documents import Block, Markup, Pair, align_documents, align_sentences
from lsmoe_ds.languages import CODE, normalize_code

Triple = tuple[str, str, str]  # our code, English, translation

NO_LANGUAGES = ("qqq", "qqx")  # MediaWiki's notes for translators
BOKMAL = ("no", "no_NO")  # codes that programs use for Bokmål

MALLARD = Markup(
    html=False,
    blocks=frozenset({"p", "title", "subtitle", "desc", "td"}),
    skipped=frozenset({"comment", "credit", "license"}),
)
HTML = Markup(  # as DocBook and LibreOffice write it
    html=True,
    blocks=frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "p", "div.para", "dt", "dd", "li", "th", "td"}),
    skipped=frozenset(
        {"head", "header", "aside", "footer", "nav", "script", "pre", "ul.docnav", "div.toc", "span.MAC"}
    ),
)


class Reader:
    """Read the archives of one source, one after another.

    ``members`` matches the names of the files that it needs.
    """

    members: re.Pattern[str]

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # for the provenance

    def pairs(self, members: Members) -> Iterator[Triple]:
        """Yield the pairs of an archive; either text may be empty. Raises ValueError for malformed files."""
        raise NotImplementedError


def language(name: str) -> str | None:
    """Return our code for a locale; None for English, variants of formal address, and other names."""
    code = "nb" if name in BOKMAL else normalize_code(name)
    wanted = (
        CODE.match(code)
        and code.split("_")[0] != "en"
        and not name.lower().endswith("formal")
        and code not in NO_LANGUAGES
    )
    return code if wanted else None


class Catalogues(Reader):
    """Read compiled gettext catalogues.

    With ``prose`` an entry holds many sentences; it is split if both sides have the same number.
    """

    members = re.compile(r".*/locale/[^/]+/LC_MESSAGES/[^/]+\.mo")

    def __init__(self, clean: Callable[[str], str] = without_tags, prose: bool = False) -> None:
        super().__init__()
        self.clean, self.prose = clean, prose

    def pairs(self, members: Members) -> Iterator[Triple]:
        for name, read in members.items():
            if code := language(name.split("/")[-3]):
                for entry in read_catalogue(read()):
                    for english, translation in self._split(*entry) if self.prose else [entry]:
                        cleaned = self.clean(english), self.clean(translation)
                        for pair in align_sentences(*cleaned) if self.prose else [cleaned]:
                            yield code, *pair

    def _split(self, english: str, translation: str) -> list[Pair]:
        first, second = (
            [line for line in text.splitlines() if line.strip()] for text in (english, translation)
        )
        return (
            list(zip(first, second, strict=True)) if len(first) == len(second) else [(english, translation)]
        )


class Messages(Reader):
    """Read MediaWiki's ``i18n/CODE.json``, joined by key with the English messages of the same folder."""

    members = re.compile(r"(\./)?usr/share/mediawiki/.*/i18n/(.*/)?[a-z][a-z-]*\.json")

    def pairs(self, members: Members) -> Iterator[Triple]:
        folders: dict[str, Members] = defaultdict(dict)
        for name, read in members.items():
            folders[name.rpartition("/")[0]][PurePosixPath(name).stem] = read
        for _, folder in sorted(folders.items(), key=lambda item: item[0]):
            if "en" not in folder:
                continue
            english = {key: without_wiki_markup(text) for key, text in read_messages(folder["en"]()).items()}
            for name, read in sorted(folder.items(), key=lambda item: item[0]):
                if code := language(name):
                    for key, text in read_messages(read()).items():
                        if key in english:
                            yield code, english[key], without_wiki_markup(text)


class Documents(Reader):
    """Read documents aligned with the English ones block by block.

    Documents whose blocks differ are left out, and counted. ``members`` has the groups ``language`` and
    ``document``. The archive with the English documents must come first.
    """

    def __init__(self, markup: Markup, members: str, english: str) -> None:
        super().__init__()
        self.markup, self.members, self.name_of_english = markup, re.compile(members), english
        self.english: dict[str, list[Block]] = {}
        self.counts.update(documents=0, documents_left_out=0)

    def pairs(self, members: Members) -> Iterator[Triple]:
        found = [
            (match["language"], match["document"], read)
            for name, read in members.items()
            if (match := self.members.fullmatch(name))
        ]
        for name, document, read in found:
            if name == self.name_of_english and (blocks := self.markup.read(read())):
                self.english[document] = blocks
        for name, document, read in found:
            if name == self.name_of_english or document not in self.english or not (code := language(name)):
                continue
            blocks = self.markup.read(read())
            aligned = align_documents(self.english[document], blocks) if blocks else None
            self.counts["documents_left_out" if aligned is None else "documents"] += 1
            for english, translation in aligned or ():
                if english != translation:  # equal texts are untranslated
                    yield code, english, translation
