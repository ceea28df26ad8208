"""Read requests from bodies that may be hostile: of any size, shape and depth."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from lsmoe_ds.errors import UserError
from lsmoe_ds.serve.settings import Settings

MOST_FIELDS = 1000  # most fields of a form; each text of a list is a field
SURROGATE = re.compile("[\ud800-\udfff]")
BOUNDARY = re.compile(r'boundary="?([0-9A-Za-z\'()+_,./:=? -]{1,70})"?')
NAME = re.compile(rb'[; ]name="([^"\r\n]{1,100})"')
TRUE = ("true", "1", "yes", "on")


class Refused(Exception):
    """A refused request: an HTTP status, and one sentence that says why.

    The sentence is made printable and short (:class:`lsmoe_ds.errors.UserError`), since it may quote the
    request.
    """

    def __init__(self, status: int, sentence: str, retry_after: float | None = None) -> None:
        super().__init__(str(UserError(sentence)))
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Asked:
    """A request to translate or detect ``texts``; ``is_list`` if it had a list; ``source`` may be "auto";
    ``alternatives`` is the number of further translations of each text that it asks for.
    """

    texts: tuple[str, ...]
    is_list: bool
    source: str
    target: str
    stream: bool
    alternatives: int


async def read_body(stream: AsyncIterator[bytes], length: str | None, limit: int) -> bytes:
    """Read a body. Raises Refused (413) as soon as its declared or received length exceeds the limit."""
    too_long = Refused(413, f"the request has more than the {limit:,} bytes that are allowed")
    if length is not None and length.isdecimal() and (len(length) > 18 or int(length) > limit):
        raise too_long
    body = bytearray()
    async for chunk in stream:
        body += chunk
        if len(body) > limit:
            raise too_long
    return bytes(body)


def read_fields(body: bytes, content_type: str) -> dict[str, Any]:
    """Return the fields of a body that is JSON or a form of either kind. Raises Refused (400) for any other.

    A body without a content type is read as JSON if it begins like JSON.
    """
    kind, _, more = content_type.partition(";")
    kind = kind.strip().lower()
    if kind == "multipart/form-data":
        return _read_multipart(body, more)
    if kind == "application/x-www-form-urlencoded" and body.lstrip()[:1] != b"{":
        return _read_form(body)
    if not body.strip():
        return {}
    try:
        found = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        where = (
            f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        )
        raise Refused(400, f"the body is no JSON{f': see {where}' if where else ''}") from None
    if not isinstance(found, dict):
        raise Refused(400, 'the body should be an object, such as {"q": "...", "source": "en", ...}')
    return found


def _read_form(body: bytes) -> dict[str, Any]:
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=MOST_FIELDS,
        )
    except UnicodeDecodeError:
        raise Refused(400, "the form is not percent-encoded UTF-8") from None
    except ValueError:
        raise Refused(413, f"the form has more than {MOST_FIELDS:,} fields") from None
    return _gather(pairs)


def _read_multipart(body: bytes, more: str) -> dict[str, Any]:
    found = BOUNDARY.search(more)
    if found is None:
        raise Refused(400, "the form does not say its boundary")
    parts = (b"\r\n" + body).split(b"\r\n--" + found[1].encode(), MOST_FIELDS + 1)
    if len(parts) > MOST_FIELDS + 1:
        raise Refused(413, f"the form has more than {MOST_FIELDS:,} fields")
    pairs = []
    for part in parts[1:]:
        if part.startswith(b"--"):  # the end
            break
        head, separator, value = part.partition(b"\r\n\r\n")
        name = NAME.search(head)
        if not separator or name is None:
            raise Refused(400, "the form is damaged: a field has no name")
        try:
            pairs.append((name[1].decode("utf-8"), value.decode("utf-8")))
        except UnicodeDecodeError:
            raise Refused(400, "the form is not UTF-8") from None
    return _gather(pairs)


def _gather(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the fields of a form; a field that occurs several times becomes a list."""
    found: dict[str, Any] = {}
    several: dict[str, list[str]] = {}
    for name, value in pairs:
        several.setdefault(name, []).append(value)
        found[name] = value if len(several[name]) == 1 else several[name]
    return found


def read_asked(fields: Mapping[str, Any], settings: Settings, translates: bool = True) -> Asked:
    """Read a request from its fields. Raises Refused (400 if one is wrong or missing, 413 for too much)."""
    if "q" not in fields:
        raise Refused(400, "the field q, the text, is missing")
    q = fields["q"]
    texts = q if isinstance(q, list) else [q]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(400, "q should be a text, or a list of texts")
    if settings.texts and len(texts) > settings.texts:
        raise Refused(413, f"q has {len(texts):,} texts: at most {settings.texts:,} are allowed")
    if settings.chars and (count := sum(map(len, texts))) > settings.chars:
        raise Refused(413, f"q has {count:,} characters: at most {settings.chars:,} are allowed")
    for text in texts:
        if found := SURROGATE.search(text):
            raise Refused(400, f"q has half of a pair of surrogates at character {found.start() + 1}")
    if not translates:
        return Asked(tuple(texts), isinstance(q, list), "auto", "", False, 0)
    kind = read_text(fields, "format", "text")
    if kind != "text":
        raise Refused(400, "format is text alone: this server does not translate HTML or other formats")
    stream = fields.get("stream", False)
    if isinstance(stream, str):
        stream = stream.lower() in TRUE
    if not isinstance(stream, bool):
        raise Refused(400, "stream should be true or false")
    source, target = read_text(fields, "source"), read_text(fields, "target")
    alternatives = _read_alternatives(fields, settings)
    return Asked(tuple(texts), isinstance(q, list), source, target, stream, alternatives)


def _read_alternatives(fields: Mapping[str, Any], settings: Settings) -> int:
    """Return how many translations are asked for beside the best. A search has no more than its beam."""
    given, most = fields.get("alternatives"), settings.beam - 1
    if given is None or given == "":
        return 0
    if isinstance(given, str) and re.fullmatch(r"\s*\+?[0-9]{1,9}\s*", given, re.ASCII):
        given = int(given)
    if isinstance(given, float) and given.is_integer():  # 2.0, which is an integer in JSON
        given = int(given)
    if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given <= most:
        why = f"the server searches with a beam of {settings.beam}"
        allowed = f"a whole number from 0 to {most}" if most else "0"
        raise Refused(400, f"alternatives should be {allowed}, since {why}")
    return given


def key_of(fields: Mapping[str, Any]) -> str:
    """Return the API key of a request; empty if it has none."""
    given = fields.get("api_key")
    return given if isinstance(given, str) else ""


def read_text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """Return a field that is a text. Raises Refused (400) for another type, or if it is missing."""
    given = fields.get(name, default)
    if given is None or given == "":
        raise Refused(400, f"the field {name} is missing")
    if not isinstance(given, str):
        raise Refused(400, f"{name} should be a text")
    return given
