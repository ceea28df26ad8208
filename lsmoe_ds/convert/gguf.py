"""Write the model of a GGUF file as transformers saves one: safetensors, configuration and tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from lsmoe_ds.checkpoint.tensors import Tensors, save_tensors
from lsmoe_ds.config.host import CONFIG, import_transformers
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import replaced, write_json
from lsmoe_ds.notices import counted


def find_gguf(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds nothing else for transformers; None for other folders.

    Raises UserError if there are several.
    """
    found = sorted(folder.glob("*.gguf"))
    if not found or (folder / CONFIG).is_file():
        return None
    if len(found) > 1:
        raise UserError(f"{folder} holds {counted(len(found), 'GGUF file')}: leave the one that is wanted")
    return found[0]


def write_gguf(file: Path, folder: Path) -> int:
    """Write the model of a file into a folder, in float32; return the number of its parameters.

    Quantized weights are dequantized. Raises UserError if the file cannot be read.
    """
    transformers, torch = import_transformers(), importlib.import_module("torch")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"to read {file.name} needs {package}, which is not installed: pip install 'lsmoe_ds[hosts]'"
            )
    where: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # readers of a foreign format raise many types
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from None
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)  # nothing is quantized any more
    settings |= {"architectures": [type(model).__name__], "dtype": "float32"}
    save_tensors(Tensors.of({name: value.detach() for name, value in model.named_parameters()}), folder)
    write_json(folder / CONFIG, settings)
    tokenizer.save_pretrained(folder)
    return sum(value.numel() for value in model.parameters())


def convert_gguf(file: Path, out: Path) -> dict[str, Any]:
    """Write the model of a file into a new folder, and return what was written."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another folder with --out")
    with replaced(out) as new:
        parameters = write_gguf(file, new)
    size = sum(path.stat().st_size for path in out.iterdir())
    return {"kind": "huggingface", "parameters": parameters, "bytes": size, "folder": str(out)}
