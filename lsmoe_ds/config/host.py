"""Open the folder of a model of transformers: ``config.json``, ``*.safetensors`` and ``tokenizer.json``."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import read_json
from lsmoe_ds.notices import listed, notice

Task = Literal["translate", "tag", "answer"]
# The class of transformers that loads the model of each task.
CLASSES: dict[str, str] = {
    "translate": "AutoModelForCausalLM",
    "tag": "AutoModelForTokenClassification",
    "answer": "AutoModelForQuestionAnswering",
}
CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
PREFIX = "host."  # our names of parameters are this and their names in transformers
HOST = "host"  # the folder, in a run or converted folder, to which :func:`copy_small` copies
# The small files that a run copies, so that it no longer needs the model's folder.
SMALL = (
    CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    GENERATION,
    "chat_template.jinja",
    "added_tokens.json",
)
M2M_100, NLLB_MOE = "m2m_100", "nllb-moe"  # types of models in config.json
TRANSLATORS = (M2M_100, NLLB_MOE)  # those that are imported, not used as hosts
FETCHED = ("smollm2",)  # models that `lsmoe data fetch` knows, by its table
DROPOUTS = ("dropout", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop")
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def import_transformers() -> Any:
    """Import transformers, without its progress bars and remarks. Raises UserError if it is not installed."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UserError(
            "'model.huggingface' needs transformers, which is not installed: pip install 'lsmoe_ds[hosts]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # :func:`load_pretrained` reports missing tensors itself
    return transformers


def is_host(folder: Path) -> bool:
    """Tell whether the configuration in a folder is that of a language model."""
    return _is_one_of(folder, CLASSES["translate"])


def is_encoder(folder: Path) -> bool:
    """Tell whether the configuration in a folder is that of an encoder: it labels text or fills in words."""
    return _is_one_of(folder, CLASSES["tag"], CLASSES["answer"], "AutoModelForMaskedLM")


def _is_one_of(folder: Path, *classes: str) -> bool:
    try:
        named = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architectures"]
        return any(str(name).endswith(each.removeprefix("AutoModel")) for name in named for each in classes)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_folder(folder: Path) -> None:
    """Raise UserError unless a folder has a configuration and a tokenizer."""
    if not folder.is_dir():
        fetched = folder.parent.name == "models" and folder.name in FETCHED
        hint = f", or fetch it with `lsmoe data fetch {folder.name}`" if fetched else ""
        if len(folder.parts) == 2 and not folder.parent.exists():  # may be a name on Hugging Face's hub
            hint = f"; `hf download {folder} --local-dir {folder.name}` fetches a published one"
        raise UserError(
            f"there is no folder {folder}: give a folder in which transformers saved a model{hint}"
        )
    if any(folder.glob("*.gguf")) and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds a GGUF file: `lsmoe convert {folder} --as huggingface --out DIR` writes it as "
            "safetensors"
        )
    if any((folder / name).is_file() for name in ("recipe.yaml", "provenance.json")) and (
        _type_of(folder) in (None, *TRANSLATORS)
    ):
        raise UserError(f"{folder} is one that lsmoe_ds wrote: name it as 'training.start_from'")
    if (kind := _type_of(folder)) in TRANSLATORS:
        raise UserError(
            f"{folder} holds a translation model of the type {kind}, which is imported first: `lsmoe convert "
            f"{folder} --as consolidated` does that, and so does a recipe for translation that names it here"
        )
    if lacking := [name for name in (CONFIG, TOKENIZER) if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {listed(lacking)}: give a folder in which transformers saved a model and its "
            "fast tokenizer"
        )


def _type_of(folder: Path) -> Any:
    return (read_json(folder / CONFIG) or {}).get("model_type")


def has_weights(folder: Path) -> bool:
    """Tell whether a folder has weights that are not pickled."""
    return any(folder.glob("*.safetensors"))


def check_weights(folder: Path) -> None:
    """Raise UserError unless a folder has weights that are not pickled."""
    if not has_weights(folder):
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f", but {others[0]}, which could run any code" if others else ""
        raise UserError(
            f"{folder} has no *.safetensors{found}: save the model with transformers' "
            "save_pretrained, which writes safetensors"
        )


def tell_missing_weights(folder: Path | None) -> None:
    """Warn on standard error if training would refuse the weights; not for a run's copy without weights."""
    if folder is None or (folder.name == HOST and folder.with_name("recipe.yaml").is_file()):
        return
    try:
        check_weights(folder)
    except UserError as error:
        notice(f"training will refuse this model: {error}")


def read_config(folder: Path) -> Any:
    """Return a model's configuration. Raises UserError if transformers cannot read it."""
    check_folder(folder)
    transformers = import_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of errors
        raise UserError(f"{folder / CONFIG} cannot be read: {_sentence(error)}") from None


def set_dropout(config: Any, dropout: float, attention_dropout: float) -> None:
    """Set a recipe's dropout in a configuration, where its model has dropout."""
    for names, value in ((DROPOUTS, dropout), (ATTENTION_DROPOUTS, attention_dropout)):
        for name in names:
            if hasattr(config, name):
                setattr(config, name, value)


def set_head(config: Any, task: Task, labels: Sequence[str]) -> None:
    """Set the classes of a task's head in a configuration: ``labels`` of words, or both ends of an answer.

    Raises UserError if the model already has a head for other labels.
    """
    if task == "answer":
        config.num_labels = 2
    if task != "tag" or not labels:
        return
    own = [str(each) for _, each in sorted(config.id2label.items())]
    headed = any(str(each).endswith("ForTokenClassification") for each in config.architectures or ())
    unnamed = own == [f"LABEL_{number}" for number in range(len(labels))]
    if headed and not unnamed and own != list(labels):
        raise UserError(
            f"the model tags words by {', '.join(own)}, but 'data.labels' are {', '.join(labels)}: give the "
            "same in the same order, or a model without such a head"
        )
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}


def is_in_head(name: str, model: Any) -> bool:
    """Tell whether a parameter belongs to the head that a task adds to a model of transformers."""
    return not name.startswith(f"{model.base_model_prefix}.")


def load_pretrained(folder: Path, task: Task, config: Any) -> tuple[Any, list[str]]:
    """Load a model with its weights, in float32, and list the parameters of its head without stored weights.

    Raises UserError if loading fails or other weights are missing.
    """
    transformers = import_transformers()
    import torch

    try:
        model, info = getattr(transformers, CLASSES[task]).from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # such as safetensors' own
        raise UserError(f"the model in {folder} cannot be loaded: {_sentence(error)}") from None
    fresh = [name for name in info["missing_keys"] if task != "translate" and is_in_head(name, model)]
    if missing := sorted(set(info["missing_keys"]) - set(fresh)):
        raise UserError(
            f"the weights in {folder} lack {missing[0]}: the folder is damaged, or of another task"
        )
    if left := sorted(info["unexpected_keys"]):
        notice(f"{folder} also holds {listed(left)}, which a model for this task does not use: left out")
    return model, fresh


def copy_small(folder: Path, to: Path) -> list[str]:
    """Copy a model's configuration and tokenizer, and return the names of the files."""
    to.mkdir(parents=True, exist_ok=True)
    names = [name for name in SMALL if (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, to / name)
    return names


@cache
def count_tokens(tokenizer: Path) -> int:
    """Count the tokens of a ``tokenizer.json``, special ones included. Raises UserError if it is none."""
    import_transformers()  # tokenizers are installed with transformers
    try:
        found = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{tokenizer} cannot be read: {_sentence(error)}") from None
    return int(found.get_vocab_size(with_added_tokens=True))


def window_of(config: Any) -> int | None:
    """Return the largest number of positions that a model can read; None if its configuration has none."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def end_of(folder: Path) -> str:
    """Return the text of the token that ends a model's output. Raises UserError if it is unknown."""
    path = folder / "tokenizer_config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError):
        value = None
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str) or not value:
        raise UserError(f"{path} names no eos_token: give the text that ends an answer as 'data.prompt.end'")
    return value


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
