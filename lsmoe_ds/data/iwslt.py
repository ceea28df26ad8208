"""Read IWSLT's two kinds of files: ``train.tags.de-en.de``, lines between tags, and the XML sets.

The files are not always well-formed XML (a bare ``&`` or ``<``), so no XML parser reads them. This also means
that no entity of a file is ever expanded.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lsmoe_ds.data.lines import read_aligned, read_lines
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted

# Lines about a talk. Titles and descriptions are translated and count as text, as is usual for IWSLT.
ABOUT = re.compile(
    r"\s*(<\?xml\b|</?(doc|url|keywords|speaker|talkid|videourl|videopath|date"
    r"|transcript|transcription|reviewers?|translators?)(\s[^<>]*)?/?>)",
    re.IGNORECASE,
)
TITLE = re.compile(r"^\s*<(title|description)>\s*|\s*</(title|description)>\s*$", re.IGNORECASE)
TAG = re.compile(r"<(/?)(seg|doc)\b([^<>]*)>", re.IGNORECASE)


@dataclass(frozen=True)
class Segment:
    """Hold one segment of a set, with the ids of its document and of itself, which may be empty."""

    document: str
    number: str
    text: str

    @property
    def key(self) -> tuple[str, str]:
        return self.document, self.number


def read_tagged(path: Path) -> Iterator[str]:
    """Yield the sentences of a ``train.tags`` file: all lines except those about the talk.

    The tags of titles and descriptions are removed.
    """
    for line in read_lines(path):
        if not ABOUT.match(line):
            yield TITLE.sub("", line)


def read_segments(path: Path) -> Iterator[Segment]:
    """Yield the segments of an XML set, each on one line, including those without text."""
    content, document = "\n".join(read_lines(path)), ""
    tags = list(TAG.finditer(content))
    for tag, following in zip(tags, [*tags[1:], None], strict=False):
        closes, name, attributes = tag.groups()
        if name.lower() == "doc":
            document = "" if closes else _attribute(attributes, "docid")
        elif not closes:
            end = tag.end() if attributes.endswith("/") else following.start() if following else len(content)
            text = html.unescape(content[tag.end() : end])
            lines = (line.strip() for line in re.split(r"[\r\n]+", text))
            yield Segment(document, _attribute(attributes, "id"), " ".join(line for line in lines if line))


def _attribute(attributes: str, name: str) -> str:
    """Return the value of an attribute, or an empty string."""
    found = re.search(
        rf"""(?<![\w:-]){name}\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'/]+))""", attributes, re.IGNORECASE
    )
    return next((value.strip() for value in found.groups() if value), "") if found else ""


def pair_segments(first: Path, second: Path, tell: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Yield the segments of two files that have the same docid and id.

    ``tell`` is called with a sentence about segments that only one file has. If ids are missing or not
    unique, segments are paired in order. Raises UserError if their counts then differ, and if no segment has
    a counterpart.
    """
    sides = [list(read_segments(path)) for path in (first, second)]
    texts = [{segment.key: segment.text for segment in side if segment.number} for side in sides]
    if any(len(own) != len(side) for own, side in zip(texts, sides, strict=True)):
        yield from read_aligned(
            first, second, lambda path: (segment.text for segment in read_segments(path)), "segment"
        )
        return
    both = [key for key in texts[0] if key in texts[1]]
    if not both and any(sides):
        has, too = (counted(len(side), "segment") for side in sides)
        raise UserError(
            f"{first} has {has} and {second} has {too}, but no segment's docid and id are in both"
        )
    if alone := sum(len(side) - len(both) for side in sides):
        lacks = [
            f"{path} lacks {len(other) - len(both)}"
            for path, other in ((first, sides[1]), (second, sides[0]))
        ]
        are = f"{counted(alone, 'segment')} {'is' if alone == 1 else 'are'}"
        tell(f"warning: {are} left out, whose docid and id only one file has: {' and '.join(lacks)}")
    for key in both:
        yield texts[0][key], texts[1][key]
