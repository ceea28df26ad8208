"""Write a merged model of transformers as transformers loads it, and load it as its users do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import Tensors, save_tensors
from lsmoe_ds.config.host import CLASSES, PREFIX, Task, copy_small, read_config, set_head
from lsmoe_ds.config.host_outline import empty_host
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import SequenceBatch
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.labels import OUTSIDE
from lsmoe_ds.data.prompts import SOURCE, prompt_text
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.generate import generate


def theirs(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of the host by their names in transformers; what methods have added is left out."""
    entries = Tensors.of(tensors).entries
    return Tensors(
        {name.removeprefix(PREFIX): each for name, each in entries.items() if name.startswith(PREFIX)}
    )


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe) -> list[str]:
    """Write a model and its tokenizer as transformers saves them."""
    host, task = recipe.model.huggingface, recipe.model.task
    assert host is not None
    names = [*save_tensors(theirs(tensors), folder), *copy_small(host, folder)]
    if task != "translate":  # its class and labels are others than those of the model it comes from
        config = read_config(host)
        set_head(config, task, recipe.data.labels or ())
        with torch.device("meta"):
            kind = type(empty_host(host, task, config)).__name__
        config.architectures = [kind]
        config.save_pretrained(folder)
    return names


@dataclass(frozen=True)
class ExportedHost(Exported):
    """A folder in transformers, on the CPU, which reads the parts of prompts as the code of its card does.

    What ``AutoTokenizer`` finds may add to the steps of ``tokenizer.json``.
    """

    theirs = CLASSES["translate"]
    tokenizes = "PreTrainedTokenizerFast"

    def encode(self, line: str) -> list[int]:
        return self._ids(clean_text(line), plain=True)

    def _ids(self, text: str, plain: bool = False) -> list[int]:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)
        return list(found["input_ids"])

    def logits_of(self, batch: Any) -> Tensor:
        found: Tensor = self.model(input_ids=batch.tokens).logits
        return found

    def search(
        self, sources: Sequence[Sequence[int]], direction: Direction, search: Search
    ) -> list[Hypothesis]:
        """Search as :mod:`lsmoe_ds.inference.generate` does."""
        prompt = self.recipe.data.prompt
        assert prompt is not None and prompt.end is not None and isinstance(self.vocabulary, HostTokenizer)
        first, second = prompt_text(prompt, direction).split(SOURCE)
        before, after = [*self.vocabulary.before(first).values(), *self._ids(first)], self._ids(second)
        prompts = {"input_ids": [[*before, *source, *after] for source in sources]}
        read = self.tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        none = torch.zeros(len(sources), dtype=torch.long)
        ids = read["input_ids"]
        batch = SequenceBatch(ids, ids, read["attention_mask"], none, none, none)
        window = getattr(self.model.config, "max_position_embeddings", None)
        write = partial(self.model.generate, input_ids=ids, attention_mask=batch.real)
        end = self._ids(prompt.end)[0]
        return generate(write, batch, [len(source) for source in sources], end, search, window)


@dataclass(frozen=True)
class ExportedTagger(Exported):
    """A folder whose model tags words, in transformers, on the CPU."""

    theirs = CLASSES["tag"]

    def logits_of(self, batch: Any) -> Tensor:
        found: Tensor = self._read(batch).logits
        return found

    def _read(self, batch: Any) -> Any:
        has_types = getattr(self.model.config, "type_vocab_size", 1) > 1
        types = {"token_type_ids": (batch.real == 2).long()} if has_types else {}
        return self.model(input_ids=batch.tokens, attention_mask=(batch.real > 0).long(), **types)


@dataclass(frozen=True)
class ExportedAnswerer(ExportedTagger):
    """A folder whose model finds answers, in transformers, on the CPU."""

    theirs = CLASSES["answer"]

    def logits_of(self, batch: Any) -> Tensor:
        found = self._read(batch)
        ends = torch.stack([found.start_logits, found.end_logits], 1)
        return ends.masked_fill(batch.real[:, None] == 0, OUTSIDE)


def exported_of(task: Task) -> type[Exported]:
    """Return what loads the folder of a task."""
    kinds: dict[Task, type[Exported]] = {"tag": ExportedTagger, "answer": ExportedAnswerer}
    return kinds.get(task, ExportedHost)
