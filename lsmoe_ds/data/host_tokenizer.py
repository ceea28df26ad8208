"""Use a ``tokenizer.json``, the tokenizer of a model of transformers, in place of our own vocabulary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted


class HostTokenizer:
    """Turn text into ids, as :class:`lsmoe_ds.data.vocabulary.Vocabulary` does. No text spells a special
    token.
    """

    type = "tokenizer"
    codes: tuple[str, ...] = ()  # it has no tags of ours
    unused: tuple[int, ...] = ()
    their_tags: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, content: bytes) -> None:
        """Load the content of a ``tokenizer.json``. Raises UserError if it is none."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError(
                "the tokenizer of 'model.huggingface' needs tokenizers, which is not installed: "
                "pip install 'lsmoe_ds[hosts]'"
            ) from None
        try:
            text = content.decode("utf-8")
            self._plain, self._markup = Tokenizer.from_str(text), Tokenizer.from_str(text)
            self._special = {each["id"] for each in json.loads(text)["added_tokens"] if each.get("special")}
        except Exception as error:  # tokenizers raises Exception itself
            raise UserError(
                f"the tokenizer is damaged: it is no tokenizer.json ({' '.join(str(error).split())[:200]})"
            ) from None
        self._content = content
        self._plain.encode_special_tokens = True  # a special token written in a sentence is plain text
        for tokenizer in (self._plain, self._markup):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        unknown = getattr(self._plain.model, "unk_token", None)
        number = self._plain.token_to_id(unknown) if isinstance(unknown, str) else None
        self.UNK = -1 if number is None else int(number)

    @classmethod
    def load(cls, path: str | Path) -> HostTokenizer:
        """Read a ``tokenizer.json``. Raises UserError if that fails."""
        try:
            return cls(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._plain.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return self.encode_all([clean_text(text)])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of many texts that :func:`clean_text` has already cleaned."""
        found: list[Any] = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(each.ids) for each in found]

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of a text, in which special tokens that are written out keep their meaning."""
        return list(self._markup.encode(text, add_special_tokens=False).ids)

    def before(self, text: str) -> dict[str, int]:
        """Return the token that must start a sequence, with its id; empty if ``text`` begins with it."""
        first = self._markup.encode("", add_special_tokens=True)
        if first.ids[:1] == self.encode_markup(text)[:1]:
            return {}
        return dict(zip(first.tokens[:1], first.ids[:1], strict=True))

    def begin(self, text: str) -> list[int]:
        """Return the ids of a text at the start of a sequence, with the token that must come first."""
        return [*self.before(text).values(), *self.encode_markup(text)]

    def end(self, text: str | None) -> list[int]:
        """Return the ids that end an answer. Raises UserError unless there is exactly one.

        Translation stops at one token, and the first of several may also occur within an answer.
        """
        ids = self.encode_markup(text or "")
        if len(ids) != 1:
            raise UserError(
                f"'data.prompt.end' is {text!r}, which is {counted(len(ids), 'token')} of the model's "
                "tokenizer: give a text that is one, such as </s>"
            )
        return ids

    @property
    def joins_words(self) -> bool:
        """Tell whether the first word of a text gets no word-start mark, as in RoBERTa's byte-level pieces,
        so that words encoded one by one would be joined.
        """
        step = json.loads(self._content).get("pre_tokenizer") or {}
        steps = step.get("pretokenizers", [step])
        return any(each.get("type") == "ByteLevel" and not each.get("add_prefix_space") for each in steps)

    @property
    def padding(self) -> int:
        """The id that pads a batch. Any id will do: models get a mask of the padding."""
        found = (self._plain.token_to_id(token) for token in ("<pad>", "[PAD]"))
        return next((int(number) for number in found if number is not None), 0)

    def encode_words(self, words: Sequence[str], longest: int) -> Iterator[tuple[list[int], list[int]]]:
        """Yield a sentence in pieces of at most ``longest`` tokens, cut between words.

        A piece is its ids with special tokens, and the position of the first sub-word of each of its words,
        or -1. A longer word loses its end.
        """
        room = longest - self._plain.num_special_tokens_to_add(False)
        whole = self._plain.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        sizes = Counter(whole.word_ids)
        start = count = 0
        for number in range(len(words) + 1):
            if number == len(words) or (count and count + sizes[number] > room):
                part = self._plain.encode(
                    list(words[start:number]), is_pretokenized=True, add_special_tokens=False
                )
                part.truncate(room)
                made = self._plain.post_process(part)
                first = {word: i for i, word in reversed(list(enumerate(made.word_ids))) if word is not None}
                yield list(made.ids), [first.get(word, -1) for word in range(number - start)]
                start, count = number, 0
            count += sizes[number]

    def encode_windows(
        self, question: str, context: str, longest: int, stride: int
    ) -> Iterator[tuple[list[int], int, list[tuple[int, int]]]]:
        """Yield a question with each window of its context, together at most ``longest`` tokens.

        Yields the ids, the position where the context begins, and the (start, end) characters of each context
        token. A question is cut to a quarter of ``longest``.
        """
        asked = self._plain.encode(question, add_special_tokens=False)
        asked.truncate(max(1, longest // 4))
        read = self._plain.encode(context, add_special_tokens=False)
        room = longest - len(asked.ids) - self._plain.num_special_tokens_to_add(True)
        read.truncate(room, stride=min(stride, room - 1))
        for part in (read, *read.overflowing):
            made = self._plain.post_process(asked, part)
            ids = made.sequence_ids
            begin = ids.index(1) if 1 in ids else len(ids)
            spans = [(int(start), int(end)) for start, end in made.offsets[begin : begin + len(part.ids)]]
            yield list(made.ids), begin, spans

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; special tokens are skipped."""
        return str(self._plain.decode([int(i) for i in ids if int(i) not in self._special]))

    def save(self, path: Path) -> None:
        path.write_bytes(self._content)
