"""Know the language codes of other projects, and write recipes with them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import yaml

from support.small_corpora import recipe as small_recipe


def listed_by_transformers(model: str) -> list[str]:
    """Read the codes that a tokenizer of transformers lists in its source, without importing it."""
    home = Path(importlib.util.find_spec("transformers").submodule_search_locations[0])
    source = (home / "models" / model / f"tokenization_{model}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FAIRSEQ_LANGUAGE_CODES":
            found = ast.literal_eval(node.value)
            return found["m2m100"] if isinstance(found, dict) else found
    raise AssertionError(f"{model} lists no codes")


NLLB, MBART_50, M2M = (listed_by_transformers(model) for model in ("nllb", "mbart50", "m2m_100"))


def write_recipe(folder: Path, rank: Any = None, **data: Any) -> Path:
    """Write a small recipe with other keys of ``data``, and low-rank matrices if a rank is given."""
    value = small_recipe(folder).model_dump(mode="json", exclude_none=True)
    value["data"] = {**value["data"], "directions": [], "languages": [], **data}
    value["training"]["learning_rate"] = 0.001
    if rank is not None:
        value["model"]["low_rank"] = {"rank": rank, "index": "language"}
    (folder / "r.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    return folder / "r.yaml"
