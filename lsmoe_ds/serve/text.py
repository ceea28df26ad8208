"""Split a text into lines: the words of each are translated, the white space around them is kept."""

from __future__ import annotations

import re
from typing import NamedTuple

# The line ends of str.splitlines, except the separators of files and records, which do not end lines of text.
LINE = re.compile("[^\r\n\v\f\x85\u2028\u2029]*(?:\r\n|[\r\n\v\f\x85\u2028\u2029]|\\Z)")


class Line(NamedTuple):
    """White space, the words to translate (empty in a blank line), and white space with the line end."""

    before: str
    words: str
    after: str


def split_lines(text: str) -> list[Line]:
    """Split a text into lines; joined together they are the text again."""
    found = []
    for match in LINE.finditer(text):
        if line := match.group():
            words = line.strip()
            at = line.find(words) if words else len(line)
            found.append(Line(line[:at], words, line[at + len(words) :]))
    return found
