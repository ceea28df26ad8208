"""Write a merged model of transformers in transformers' format, and load it as users would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.tensors import Tensors, save_tensors
from lsmoe_ds.config.host import (
    CLASSES,
    CONFIG,
    GENERATION,
    PREFIX,
    TOKENIZER,
    Task,
    copy_small,
    read_config,
    set_head,
    window_of,
)
from lsmoe_ds.config.host_outline import empty_host
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import SequenceBatch
from lsmoe_ds.data.cleaning import clean_text
from lsmoe_ds.data.host_tokenizer import HostTokenizer
from lsmoe_ds.data.labels import OUTSIDE
from lsmoe_ds.data.prompts import SOURCE, prompt_text
from lsmoe_ds.directions import Direction
from lsmoe_ds.export.huggingface import Exported
from lsmoe_ds.folders import read_json, write_json
from lsmoe_ds.inference.beam_search import Hypothesis, Search
from lsmoe_ds.inference.generate import PER_SOURCE_TOKEN, generate

DTYPE = ("dtype", "torch_dtype")  # keys of a configuration; the second before transformers 5


def theirs(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors of the host by their names in transformers, without those of methods."""
    entries = Tensors.of(tensors).entries
    return Tensors(
        {name.removeprefix(PREFIX): each for name, each in entries.items() if name.startswith(PREFIX)}
    )


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe) -> list[str]:
    """Write a model and its tokenizer as transformers saves them."""
    host, task = recipe.model.huggingface, recipe.model.task
    assert host is not None
    weights = theirs(tensors)
    names = [*save_tensors(weights, folder), *copy_small(host, folder)]
    kind = str(next(iter(weights.entries.values())).dtype).removeprefix("torch.")
    if task == "translate":
        written = read_json(folder / CONFIG) or {}
        # The type in which transformers loads the weights: the host's own type may round them.
        write_json(folder / CONFIG, written | {name: kind for name in DTYPE if name in written})
        write_json(folder / GENERATION, generation_config(host, recipe))
        return names if GENERATION in names else [*names, GENERATION]
    # The class and labels differ from those of the original model.
    config = read_config(host)
    config.dtype = kind
    set_head(config, task, recipe.data.labels or ())
    with torch.device("meta"):
        config.architectures = [type(empty_host(host, task, config)).__name__]
    config.save_pretrained(folder)
    return names


def generation_config(host: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the settings of our search. The host's own may sample, or penalize repetitions."""
    prompt, window = recipe.data.prompt, window_of(read_config(host))
    assert prompt is not None and prompt.end is not None
    end = HostTokenizer.load(host / TOKENIZER).encode_markup(prompt.end)[0]
    most = math.ceil(PER_SOURCE_TOKEN * recipe.data.batch.max_length) + Search().extra
    return {
        "num_beams": Search().beam,
        "length_penalty": Search().length_penalty,
        "early_stopping": True,
        "max_new_tokens": min(most, window) if window is not None else most,
        "eos_token_id": end,
        "pad_token_id": end,
    }


@dataclass(frozen=True)
class ExportedHost(Exported):
    """A folder in transformers, on the CPU; it encodes the parts of prompts like the code in the model card.

    ``AutoTokenizer`` may add to the steps of ``tokenizer.json``.
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
    ) -> list[list[Hypothesis]]:
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
    """Return the class that loads a folder for a task."""
    kinds: dict[Task, type[Exported]] = {"tag": ExportedTagger, "answer": ExportedAnswerer}
    return kinds.get(task, ExportedHost)
