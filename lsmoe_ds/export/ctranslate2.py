"""Write a dense model for CTranslate2: its weights under that library's names, its vocabulary, and how
sentences begin and end.

Translation then needs only sentencepiece and ctranslate2. The source is the tag of the target language and
the pieces of the text (``["<2de>", "▁Hello", ...]``). ``config.json`` says that ``</s>`` follows a source,
and that decoding begins with ``</s>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.vocabulary import SPECIALS
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.vocabulary_map import VocabularyMap
from lsmoe_ds.inference.ctranslate2 import MAP, PIECES, library
from lsmoe_ds.languages import BOS, EOS, UNK, nearest
from lsmoe_ds.model.embedding import FIRST_POSITION, sinusoids
from lsmoe_ds.notices import counted

FILES = ["model.bin", "config.json", PIECES]
QUANTIZATIONS = ("float32", "int8", "int8_float32")  # of the stored weights
POSITIONS = 1024  # CTranslate2 cuts longer sources


def write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    vocabulary: Path,
    quantization: str = "float32",
    candidates: VocabularyMap | None = None,
) -> list[str]:
    """Write a dense model's weights (by global name) and vocabulary into ``folder``, and the ``candidates``
    of its output layer, and return the names of the files.

    Raises UserError for an unknown quantization, and for weights that are not those of the recipe and
    vocabulary.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    specify(tensors, recipe, pieces, quantization).save(str(folder))
    if candidates is None:
        return FILES
    candidates.write(folder, pieces)
    return [*FILES, MAP]


def specify(tensors: Mapping[str, Tensor], recipe: Recipe, pieces: Sequence[str], quantization: str) -> Any:
    """Return the model as a ``ctranslate2.specs.TransformerSpec`` that is ready to be saved; raises as
    :func:`write_files`.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"'{quantization}' is no quantization{nearest(quantization, QUANTIZATIONS)}: choose "
            f"{', '.join(QUANTIZATIONS)}"
        )
    specs, model = library().specs, recipe.model
    layers = model.encoder.layers, model.decoder.layers
    spec = specs.TransformerSpec.from_config(
        layers, model.heads, pre_norm=True, activation=specs.Activation.RELU
    )
    weights = {name: value.detach().to("cpu", torch.float32).numpy() for name, value in tensors.items()}

    def fill(part: Any, *names: str) -> None:
        """Fill a linear layer or norm from ours; several linear layers become one, outputs concatenated."""
        kernel = "gamma" if hasattr(part, "gamma") else "weight"
        for ours, theirs in (("weight", kernel), ("bias", "beta" if kernel == "gamma" else "bias")):
            joined = torch.cat([torch.from_numpy(weights[f"{name}.{ours}"]) for name in names])
            setattr(part, theirs, joined.numpy())

    def fill_attention(part: Any, at: str, joined: Sequence[Sequence[str]]) -> None:
        fill(part.layer_norm, f"{at}_norm".replace(".cross_attention_norm", ".cross_norm"))
        for linear, names in zip(part.linear, [*joined, ["output"]], strict=True):
            fill(linear, *(f"{at}.{name}" for name in names))

    try:
        positions = sinusoids(
            FIRST_POSITION, max(POSITIONS, 2 * recipe.data.batch.max_length + 32), model.hidden
        ).numpy()
        for side, part in (("encoder", spec.encoder), ("decoder", spec.decoder)):
            embeddings = part.embeddings[0] if side == "encoder" else part.embeddings
            embeddings.weight = weights["embedding.tokens.weight"]
            part.position_encodings.encodings = positions
            fill(part.layer_norm, f"{side}_norm")
            for index, layer in enumerate(part.layer):
                at = f"{side}.{index}"
                fill_attention(layer.self_attention, f"{at}.attention", [["query", "key", "value"]])
                if side == "decoder":
                    fill_attention(layer.attention, f"{at}.cross_attention", [["query"], ["key", "value"]])
                fill(layer.ffn.layer_norm, f"{at}.feed_forward_norm")
                fill(layer.ffn.linear_0, f"{at}.feed_forward.expand")
                fill(layer.ffn.linear_1, f"{at}.feed_forward.contract")
        spec.decoder.projection.weight = weights["embedding.tokens.weight"]
    except KeyError as error:
        raise UserError(f"the weights lack {error}: they do not belong to this recipe") from None
    if len(pieces) != len(weights["embedding.tokens.weight"]):
        tokens = counted(len(weights["embedding.tokens.weight"]), "token")
        raise UserError(f"the weights are of {tokens}, but the vocabulary has {len(pieces):,}")
    spec.register_source_vocabulary(list(pieces))
    spec.register_target_vocabulary(list(pieces))
    spec.config.bos_token, spec.config.unk_token = SPECIALS[BOS], SPECIALS[UNK]
    spec.config.eos_token = spec.config.decoder_start_token = SPECIALS[EOS]
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize(quantization)
    return spec
