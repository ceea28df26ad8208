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
from lsmoe_ds.data.labels import OUTSIDE
from lsmoe_ds.data.prompts import prompt_text
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
    """A folder in transformers, on the CPU, which reads prompts as text by its own tokenizer."""

    theirs = CLASSES["translate"]

    def encode(self, line: str) -> list[int]:
        return list(self.tokenizer(line, add_special_tokens=False)["input_ids"])

    def logits_of(self, batch: Any) -> Tensor:
        found: Tensor = self.model(input_ids=batch.tokens).logits
        return found

    def search(
        self, sources: Sequence[Sequence[int]], direction: Direction, search: Search
    ) -> list[Hypothesis]:
        """Search as :mod:`lsmoe_ds.inference.generate` does, from prompts that are tokenized as a whole."""
        prompt = self.recipe.data.prompt
        assert prompt is not None and prompt.end is not None
        texts = [prompt_text(prompt, direction, self.vocabulary.decode(source)) for source in sources]
        self.tokenizer.padding_side = "left"
        begun = str(self.tokenizer.bos_token or "")
        special = not (begun and texts[0].startswith(begun))
        read = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special)
        none = torch.zeros(len(texts), dtype=torch.long)
        ids = read["input_ids"]
        batch = SequenceBatch(ids, ids, read["attention_mask"], none, none, none)
        end = self.encode(prompt.end)[0]
        window = getattr(self.model.config, "max_position_embeddings", None)
        write = partial(self.model.generate, input_ids=ids, attention_mask=batch.real)
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
