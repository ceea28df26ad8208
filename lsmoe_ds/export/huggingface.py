"""A dense model as ``transformers`` loads it: M2M-100 with a fast tokenizer that gives our ids. Written
without transformers.

Its weights are :mod:`lsmoe_ds.checkpoint.m2m_100`, its tokenizer :mod:`lsmoe_ds.export.tokenizer`. V
vocabulary.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.m2m_100 import rename, widest
from lsmoe_ds.checkpoint.stored import Stored
from lsmoe_ds.checkpoint.tensors import save_tensors
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batching import DirectionIds, collate
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.export.tokenizer import special_tokens, tokenizer, tokenizer_config
from lsmoe_ds.folders import write_json
from lsmoe_ds.inference.beam_search import Hypothesis, Search, never_generated
from lsmoe_ds.languages import BOS, EOS, PAD, Direction, Languages
from lsmoe_ds.methods.context import Route

POSITIONS = 1024  # transformers makes further ones when they are needed


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: Path) -> list[str]:
    """Write the kind ``huggingface``. Raises UserError if the tensors or the vocabulary are not the recipe's."""
    loaded = Vocabulary.load(vocabulary)
    model = config(recipe, loaded.size)
    names = save_tensors(rename(tensors, recipe, loaded.size), folder)
    written = {
        "config.json": model,
        "generation_config.json": generation_config(recipe, loaded),
        "tokenizer.json": tokenizer(loaded, vocabulary.read_bytes(), recipe.languages.directions[0].target, recipe.data.vocabulary.type),
        "tokenizer_config.json": tokenizer_config(recipe),
        "special_tokens_map.json": special_tokens(),
    }
    for name, value in written.items():
        write_json(folder / name, value)
    return [*names, *written]


def config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """Return ``config.json`` of M2M-100."""
    model, encoder, decoder = recipe.model, recipe.model.encoder, recipe.model.decoder
    return {
        "architectures": ["M2M100ForConditionalGeneration"],
        "model_type": "m2m_100",
        "is_encoder_decoder": True,
        "vocab_size": vocabulary,
        "d_model": model.hidden,
        "encoder_layers": encoder.layers,
        "encoder_attention_heads": model.heads,
        "encoder_ffn_dim": widest(encoder),
        "decoder_layers": decoder.layers,
        "decoder_attention_heads": model.heads,
        "decoder_ffn_dim": widest(decoder),
        "activation_function": "relu",
        "scale_embedding": True,
        "tie_word_embeddings": True,
        "max_position_embeddings": max(POSITIONS, longest_translation(recipe) + 2),
        "dropout": recipe.training.dropout,
        "attention_dropout": recipe.training.attention_dropout,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
        "dtype": "float32",
        "torch_dtype": "float32",  # its name before version 5
    }


def longest_translation(recipe: Recipe) -> int:
    """Return the most tokens that we generate for the longest source, EOS not counted."""
    return int(Search().limits(torch.tensor(recipe.data.batch.max_length)))


def generation_config(recipe: Recipe, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the settings of our search (lsmoe_ds/inference/beam_search.py); with ``renormalize_logits`` what
    is never generated has no probability.
    """
    return {
        "num_beams": Search().beam,
        "length_penalty": Search().length_penalty,
        "early_stopping": True,
        "min_new_tokens": 1,  # beside EOS
        "max_new_tokens": longest_translation(recipe) + 1,
        "suppress_tokens": sorted(never_generated(vocabulary)),
        "renormalize_logits": True,
        "bos_token_id": BOS,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": EOS,
    }


@dataclass(frozen=True)
class Exported:
    """A folder of the kind ``huggingface`` in transformers, on the CPU; see
    :class:`lsmoe_ds.inference.engine.Engine`.
    """

    model: Any
    tokenizer: Any
    recipe: Recipe
    vocabulary: Vocabulary
    languages: Languages
    step: int
    home: Path
    route: Route = "specific"
    device: str = "cpu"

    @classmethod
    def load(cls, stored: Stored) -> Exported:
        """Load it as anybody would; needs transformers."""
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        model = transformers.M2M100ForConditionalGeneration.from_pretrained(stored.home).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(stored.home)
        return cls(model, tokenizer, stored.recipe, Vocabulary.load(stored.vocabulary), stored.recipe.languages, 0, stored.home)

    def encode(self, line: str) -> list[int]:
        """Return the ids of a line by the folder's tokenizer, without tag and EOS."""
        return list(self.tokenizer(line)["input_ids"][1:-1])

    def logits(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        """Return teacher-forced logits [B, T, V]; those at padding mean nothing."""
        found: Tensor = self.model(input_ids=source, attention_mask=source != PAD, decoder_input_ids=decoder_input).logits
        return found

    def search(self, sources: Sequence[Sequence[int]], direction: Direction, search: Search) -> list[Hypothesis]:
        """Search with the folder's own settings, except for the beam and the greatest length, which is ours
        for each sentence.
        """
        number = self.languages.direction_id(direction)
        batch = collate(sources, None, [number] * len(sources), DirectionIds.of(self.languages, self.vocabulary))
        limits = search.limits((batch.source != PAD).sum(1))

        def end(tokens: Tensor, scores: Tensor) -> Tensor:
            """Allow only EOS once the greatest length is reached; tokens [B W, positions], scores [B W, V]."""
            over = (limits < tokens.shape[1]).repeat_interleave(search.beam)
            ends = scores[over, EOS]
            scores = scores.masked_fill(over[:, None], -math.inf)
            scores[over, EOS] = ends
            return scores

        # An end that is forced has its own probability, so it comes after the normalization, which generate would do last.
        transformers: Any = importlib.import_module("transformers")
        processors = transformers.LogitsProcessorList([transformers.LogitNormalization(), end])
        found = self.model.generate(
            input_ids=batch.source,
            attention_mask=batch.source != PAD,
            num_beams=search.beam,
            length_penalty=search.length_penalty,
            max_new_tokens=int(limits.max()) + 1,
            logits_processor=processors,
            renormalize_logits=False,
        )
        return [Hypothesis(_until_eos(row[1:]), math.nan) for row in found.tolist()]


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
