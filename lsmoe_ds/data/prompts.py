"""Prompts: sentence pairs as text that a decoder-only language model continues.

A sequence is ``before source after target end``. The text around source and target depends on the
direction; the model learns only target and end. B sentences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike

from lsmoe_ds.config.data import Prompt
from lsmoe_ds.data.batches import IGNORED, SequenceBatch
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.shuffling import Integers
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.languages import language_name

if TYPE_CHECKING:
    from lsmoe_ds.data.host_tokenizer import HostTokenizer
    from lsmoe_ds.data.prepared import PreparedData

SOURCE = "{source}"


def prompt_text(prompt: Prompt, direction: Direction, source: str = SOURCE) -> str:
    """Return the prompt of a direction as text, by default with a placeholder for the source."""
    text = prompt.text.replace("{source_language}", language_name(direction.source))
    text = text.replace("{target_language}", language_name(direction.target))
    return text.replace(SOURCE, source)


def joined(prepared: PreparedData, prompt: Prompt, most: int = 200) -> tuple[int, int]:
    """Count the dev sentences whose tokens change if the whole prompt is tokenized as one text, and the
    sentences checked, about ``most``.

    Users of an exported model who write prompts as text get these other tokens.
    """
    tokenizer, found, seen = cast("HostTokenizer", prepared.vocabulary), 0, 0
    for direction in prepared.languages.directions:
        first, second = prompt_text(prompt, direction).split(SOURCE)
        around = [tokenizer.encode_markup(each) for each in (first, second)]
        for text in prepared.text(direction, "dev")[0][: max(1, most // len(prepared.languages.directions))]:
            clean = clean_text(text)
            apart = [*around[0], *tokenizer.encode(clean), *around[1]]
            found += apart != tokenizer.encode_markup(f"{first}{clean}{second}")
            seen += 1
    return found, seen


@dataclass(frozen=True, eq=False)
class Prompts:
    """The tokens around the source and target of each direction; see :class:`lsmoe_ds.data.batches.Form`."""

    source_language: Integers  # [directions]
    target_language: Integers  # [directions]
    before: tuple[Integers, ...]
    after: tuple[Integers, ...]
    end: Integers  # [1]: the token that ends a translation
    padding: int
    settings: dict[str, Any]

    given = 0

    @classmethod
    def of(cls, languages: Languages, tokenizer: HostTokenizer, prompt: Prompt) -> Prompts:
        """Tokenize the prompt of each direction. Raises UserError unless one token ends an answer."""
        sources, targets = (
            np.array([languages.id(code) for code in codes], dtype=np.int64)
            for codes in zip(*((d.source, d.target) for d in languages.directions), strict=True)
        )
        before, after = [], []
        for direction in languages.directions:
            first, second = prompt_text(prompt, direction).split(SOURCE)
            before.append(np.array(tokenizer.begin(first), dtype=np.int64))
            after.append(np.array(tokenizer.encode_markup(second), dtype=np.int64))
        end = np.array(tokenizer.end(prompt.end), dtype=np.int64)
        settings = {"data.prompt": prompt.model_dump()}
        return cls(sources, targets, tuple(before), tuple(after), end, int(end[-1]), settings)

    def overhead(self, direction: int) -> tuple[int, int]:
        """Return the positions of a direction's prompt, and those of the end."""
        return len(self.before[direction]) + len(self.after[direction]), len(self.end)

    def collate(
        self, sources: Sequence[ArrayLike], targets: Sequence[ArrayLike] | None, directions: ArrayLike
    ) -> SequenceBatch:
        """Make a batch of B pairs of token sequences; ``directions`` are B direction ids.

        The label of a position is the next token, or IGNORED within a prompt.
        """
        chosen = np.asarray(directions, dtype=np.int64)
        prompts = [
            np.concatenate([self.before[d], np.asarray(source, dtype=np.int64), self.after[d]])
            for d, source in zip(chosen.tolist(), sources, strict=True)
        ]
        answers = [np.empty(0, dtype=np.int64)] * len(prompts)
        if targets is not None:
            answers = [np.concatenate([np.asarray(each, dtype=np.int64), self.end]) for each in targets]
        # The last token of an answer is only a label, never an input.
        rows = [
            np.concatenate([prompt, answer[:-1]]) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        longest = max(map(len, rows))
        tokens = np.full((len(rows), longest), self.padding, dtype=np.int64)
        labels, real = np.full_like(tokens, IGNORED), np.zeros_like(tokens)
        for i, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True)):
            start = longest - len(row) if targets is None else 0
            tokens[i, start : start + len(row)] = row
            real[i, start : start + len(row)] = 1
            if len(answer):
                labels[i, len(prompt) - 1 : len(row)] = answer
        languages = self.source_language[chosen], self.target_language[chosen]
        arrays = tokens, labels, real, *languages, chosen
        return SequenceBatch(*(torch.from_numpy(array) for array in arrays))
