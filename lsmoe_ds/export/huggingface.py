"""Write a model in the format of ``transformers``: M2M-100, or NLLB-MoE if tokens choose experts, with a fast
tokenizer that gives our ids. Writing does not need transformers.

:mod:`lsmoe_ds.checkpoint.m2m_100` renames the weights, :mod:`lsmoe_ds.export.nllb_moe` converts the routing,
and :mod:`lsmoe_ds.export.tokenizer` the tokenizer. V vocabulary.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lsmoe_ds.checkpoint.m2m_100 import rename, type_of, widest
from lsmoe_ds.checkpoint.stored import Stored
from lsmoe_ds.checkpoint.tensors import save_tensors
from lsmoe_ds.config.host import M2M_100, NLLB_MOE
from lsmoe_ds.config.model import Model
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import DirectionIds
from lsmoe_ds.data.vocabulary import Vocabulary
from lsmoe_ds.directions import Direction, Languages
from lsmoe_ds.export import nllb_moe
from lsmoe_ds.export.their_tokenizer import files_of, style_of
from lsmoe_ds.export.tokenizer import special_tokens, tokenizer, tokenizer_config
from lsmoe_ds.folders import write_json
from lsmoe_ds.inference.beam_search import Hypothesis, Search, never_generated
from lsmoe_ds.languages import BOS, EOS, PAD
from lsmoe_ds.methods.context import Route

CLASSES = {M2M_100: "M2M100ForConditionalGeneration", NLLB_MOE: "NllbMoeForConditionalGeneration"}
POSITIONS = 1024  # transformers extends them when needed


def write_files(folder: Path, tensors: Mapping[str, Tensor], recipe: Recipe, vocabulary: Path) -> list[str]:
    """Write the kind ``huggingface``. Raises UserError if the tensors or the vocabulary do not fit
    the recipe.
    """
    if recipe.model.huggingface is not None:
        from lsmoe_ds.export.host import write_files as write_host

        return write_host(folder, tensors, recipe)
    loaded, content = Vocabulary.load(vocabulary), vocabulary.read_bytes()
    model = config(recipe, loaded.size)
    names = save_tensors(rename(tensors, recipe, loaded.size), folder)
    written = {"config.json": model, "generation_config.json": generation_config(recipe, loaded)}
    if (style := style_of(loaded, recipe)) is not None:
        written |= files_of(style, loaded, content, recipe)
    else:
        first = recipe.languages.directions[0]
        head = first.target if recipe.data.tags == "target" else first.source
        written["tokenizer.json"] = tokenizer(loaded, content, head, recipe.data.vocabulary.type)
        written["tokenizer_config.json"] = tokenizer_config(recipe)
        written["special_tokens_map.json"] = special_tokens()
    for name, value in written.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        else:
            write_json(folder / name, value)
    return [*names, *written]


def config(recipe: Recipe, vocabulary: int) -> dict[str, Any]:
    """Return ``config.json`` of M2M-100 or NLLB-MoE. Raises UserError for experts that neither supports."""
    model, encoder, decoder = recipe.model, recipe.model.encoder, recipe.model.decoder
    return {
        "architectures": [class_of(model)],
        "model_type": type_of(model),
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
        **(nllb_moe.settings(model) if type_of(model) == NLLB_MOE else {}),
    }


def class_of(model: Model) -> str:
    """Return the class of transformers that has these layers."""
    return CLASSES[type_of(model)]


def longest_translation(recipe: Recipe) -> int:
    """Return the largest number of tokens that we generate for a source, without EOS and a given tag."""
    return int(Search().limits(torch.tensor(recipe.data.batch.max_length)))


def generation_config(recipe: Recipe, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the settings of our search (lsmoe_ds/inference/beam_search.py). ``renormalize_logits`` gives
    tokens that are never generated no share of the probability.

    A given tag is a forced token, by default the tag of the first direction; it fills one position. Then tags
    are listed as bad words instead of suppressed tokens: bad words are banned before a token is forced,
    suppressed ones after it.
    """
    never = sorted(never_generated(vocabulary))
    given = 0 if recipe.data.tags == "target" else 1
    tags = (
        {
            "forced_bos_token_id": vocabulary.tag_id(recipe.languages.directions[0].target),
            "bad_words_ids": [[each] for each in never],
        }
        if given
        else {"suppress_tokens": never}
    )
    return {
        "num_beams": Search().beam,
        "length_penalty": Search().length_penalty,
        "early_stopping": True,
        "min_new_tokens": 1 + given,  # beside EOS
        "max_new_tokens": longest_translation(recipe) + 1 + given,
        **tags,
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

    theirs: ClassVar[str | None] = None  # the class that loads the model; None: chosen by its layers
    tokenizes: ClassVar[str] = "AutoTokenizer"

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
    def open(cls, stored: Stored) -> Exported:
        """Load the model with the class that fits it; needs transformers."""
        if stored.recipe.model.huggingface is not None:
            from lsmoe_ds.export.host import exported_of

            return exported_of(stored.recipe.model.task).load(stored)
        return cls.load(stored)

    @classmethod
    def load(cls, stored: Stored) -> Exported:
        """Load it as users would, with the recipe and vocabulary of ``stored.home``; needs transformers."""
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        kind = getattr(transformers, cls.theirs or class_of(stored.recipe.model))
        model = kind.from_pretrained(stored.weights_in, dtype=torch.float32)
        tokenizer = getattr(transformers, cls.tokenizes).from_pretrained(stored.weights_in)
        if tokenizer.pad_token is None:  # any will do: padding is masked
            tokenizer.pad_token = tokenizer.eos_token
        return cls(
            model.eval(),
            tokenizer,
            stored.recipe,
            Vocabulary.load(stored.vocabulary),
            stored.recipe.languages,
            0,
            stored.home,
        )

    def encode(self, line: str) -> list[int]:
        """Encode a line with the folder's tokenizer; return its ids without tag and EOS."""
        return list(self.tokenizer(line)["input_ids"][1:-1])

    def logits_of(self, batch: Any) -> Tensor:
        """Return teacher-forced logits [B, T, V] of a batch; logits at padding are meaningless."""
        found: Tensor = self.model(
            input_ids=batch.source,
            attention_mask=batch.source != PAD,
            decoder_input_ids=batch.decoder_input,
        ).logits
        return found

    def search(
        self, sources: Sequence[Sequence[int]], direction: Direction, search: Search
    ) -> list[list[Hypothesis]]:
        """Search with the folder's own settings, except the beam and our maximum length of each sentence."""
        number = self.languages.direction_id(direction)
        ids = DirectionIds.of(self.languages, self.vocabulary, self.recipe.data.tags)
        batch = ids.collate(sources, None, [number] * len(sources))
        given = batch.decoder_input[0, 1:].tolist()
        limits = search.limits((batch.source != PAD).sum(1))

        def end(tokens: Tensor, scores: Tensor) -> Tensor:
            """Allow only EOS at the maximum length; tokens [B W, positions], scores [B W, V]."""
            over = (limits < tokens.shape[1] - len(given)).repeat_interleave(search.beam)
            ends = scores[over, EOS]
            scores = scores.masked_fill(over[:, None], -math.inf)
            scores[over, EOS] = ends
            return scores

        # A forced end keeps its own probability, so force it after the normalization, which `generate` would
        # do last.
        transformers: Any = importlib.import_module("transformers")
        processors = transformers.LogitsProcessorList([transformers.LogitNormalization(), end])
        found = self.model.generate(
            input_ids=batch.source,
            attention_mask=batch.source != PAD,
            num_beams=search.beam,
            num_return_sequences=search.n_best,
            length_penalty=search.length_penalty,
            max_new_tokens=int(limits.max()) + 1 + len(given),
            **({"forced_bos_token_id": given[0]} if given else {}),
            logits_processor=processors,
            renormalize_logits=False,
        )
        rows = [Hypothesis(_until_eos(row[1 + len(given) :]), math.nan) for row in found.tolist()]
        return [rows[start : start + search.n_best] for start in range(0, len(rows), search.n_best)]


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
