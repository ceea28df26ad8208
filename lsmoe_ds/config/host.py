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
from lsmoe_ds.notices import listed, notice

Task = Literal["translate", "tag", "answer"]
# What loads the model of a task.
CLASSES: dict[str, str] = {
    "translate": "AutoModelForCausalLM",
    "tag": "AutoModelForTokenClassification",
    "answer": "AutoModelForQuestionAnswering",
}
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
PREFIX = "host."  # before the names that parameters have in transformers
HOST = "host"  # the folder, in a run or converted folder, of what :func:`copy_small` copies
# What a run copies beside the weights, so that it needs the folder no more.
SMALL = (
    CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
)
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
    transformers.utils.logging.set_verbosity_error()  # it reports tensors that :func:`load_pretrained` names
    return transformers


def is_host(folder: Path) -> bool:
    """Tell whether the configuration in a folder is that of a language model."""
    return _is_one_of(folder, CLASSES["translate"])


def is_encoder(folder: Path) -> bool:
    """Tell whether the configuration in a folder is that of a model that labels text, or fills in words."""
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
        raise UserError(
            f"there is no folder {folder}: give a folder in which transformers saved a model{hint}"
        )
    if any(folder.glob("*.gguf")) and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds a GGUF file: `lsmoe convert {folder} --to huggingface --out DIR` writes it as "
            "safetensors"
        )
    if lacking := [name for name in (CONFIG, TOKENIZER) if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} lacks {listed(lacking)}: give a folder in which transformers saved a model and its "
            "fast tokenizer"
        )


def has_weights(folder: Path) -> bool:
    """Tell whether a folder has weights that are no pickles."""
    return any(folder.glob("*.safetensors"))


def check_weights(folder: Path) -> None:
    """Raise UserError unless a folder has weights that are no pickles."""
    if not has_weights(folder):
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f", but {others[0]}, which could run any code" if others else ""
        raise UserError(
            f"{folder} has no *.safetensors{found}: save the model with transformers' "
            "save_pretrained, which writes safetensors"
        )


def tell_missing_weights(folder: Path | None) -> None:
    """Say on standard error what training would refuse, unless a run's copy of the configuration is named."""
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
    except Exception as error:  # whatever transformers raises of what it does not like
        raise UserError(f"{folder / CONFIG} cannot be read: {_sentence(error)}") from None


def set_dropout(config: Any, dropout: float, attention_dropout: float) -> None:
    """Let a configuration have a recipe's dropout, where its model has any."""
    for names, value in ((DROPOUTS, dropout), (ATTENTION_DROPOUTS, attention_dropout)):
        for name in names:
            if hasattr(config, name):
                setattr(config, name, value)


def set_head(config: Any, task: Task, labels: Sequence[str]) -> None:
    """Let a configuration have the classes of a task's head: ``labels`` of words, or both ends of an answer.

    Raises UserError if the model has a head for other labels.
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
    """Tell whether a parameter is of what a task adds to the body of a model of transformers."""
    return not name.startswith(f"{model.base_model_prefix}.")


def load_pretrained(folder: Path, task: Task, config: Any) -> tuple[Any, list[str]]:
    """Load a model with its weights, in float32, and list the parameters of its head that have none.

    Raises UserError if that fails or other weights are missing.
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
        notice(f"the model in {folder} has no place for {listed(left)}, which its files hold: left out")
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
    import_transformers()  # without which there are no tokenizers either
    try:
        found = importlib.import_module("tokenizers").Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{tokenizer} cannot be read: {_sentence(error)}") from None
    return int(found.get_vocab_size(with_added_tokens=True))


def window_of(config: Any) -> int | None:
    """Return the most positions that a model can read; None if its configuration does not say."""
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def end_of(folder: Path) -> str:
    """Return the text of the token with which a model ends what it writes. Raises UserError if unknown."""
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
