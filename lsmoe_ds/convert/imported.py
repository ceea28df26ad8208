"""Import models of Hugging Face that cannot be hosts: M2M-100, NLLB and NLLB-MoE."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsmoe_ds import __version__
from lsmoe_ds.checkpoint.stored import RECIPE, write_folder
from lsmoe_ds.convert.model_card import model_card
from lsmoe_ds.convert.recipes import FILES, describe
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.importing import Asked, read_huggingface
from lsmoe_ds.export.subnetwork import ALL


def import_model(folder: Path, to: str, asked: Asked, out: Path) -> dict[str, Any]:
    """Write a model of Hugging Face in our form, from which a training starts, and return what was
    written.
    """
    if to != "consolidated":
        raise UserError(
            f"{folder} is a Hugging Face model: import it first, by `lsmoe convert {folder} --as "
            "consolidated`"
        )
    read = describe(folder)
    tensors, recipe, vocabulary = read_huggingface(folder, asked, out)
    made = {
        "run": recipe.name,
        "imported_from": folder.resolve().name,
        FILES: read,
        "direction": ALL,
        "route": "specific",
        "step": 0,
    }
    made |= {
        "version": __version__,
        "source_files": {},
        "sparse_parameters": tensors.numbers,
        "dense_parameters": tensors.numbers,
    }
    provenance = {"kind": to, **made}
    write = importlib.import_module("lsmoe_ds.export.consolidated").write_files
    card = model_card(to, recipe, provenance, folder)
    files = write_folder(out, tensors, recipe, vocabulary, provenance, card, write)
    return {
        "kind": to,
        "parameters": tensors.numbers,
        "bytes": weight_bytes(files),
        "folder": str(out),
        "recipe": str(out / RECIPE),
    }


def weight_bytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the size of the weights among the files of a folder."""
    weights = ("model", "adapter_model")
    return sum(each["bytes"] for name, each in files.items() if Path(name).name.startswith(weights))
