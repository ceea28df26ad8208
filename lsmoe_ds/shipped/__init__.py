"""Find the recipes, studies, DeepSpeed configurations and SLURM scripts that come with lsmoe_ds.

In a checkout they are folders beside the package; an installed package has them here, where setup.py puts
them.
"""

from __future__ import annotations

import os
import sys
from os.path import isfile
from pathlib import Path

from lsmoe_ds.notices import guess_rank

HERE = Path(__file__).resolve().parent
ROOT = HERE if (HERE / "recipes").is_dir() else HERE.parent.parent
FOLDERS = {
    "recipe": ("recipes", ".yaml"),
    "study": ("studies", ".yaml"),
    "DeepSpeed configuration": ("ds_configs", ".json"),
}


def names(kind: str) -> list[str]:
    """Return the names of what comes with lsmoe_ds, such as ``demo`` and ``papers/iwslt14-switch-16``."""
    folder, suffix = FOLDERS[kind]
    return sorted(
        str(path.relative_to(ROOT / folder).with_suffix("")) for path in (ROOT / folder).rglob(f"*{suffix}")
    )


def find(kind: str, name: str | Path) -> Path | None:
    """Return the file that is called ``recipes/demo.yaml``, ``demo.yaml`` or ``demo``; None if there is
    none.
    """
    folder, suffix = FOLDERS[kind]
    name = str(name).removeprefix(f"{folder}/").removesuffix(suffix)
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    path = ROOT / folder / f"{name}{suffix}"
    return path if isfile(path) else None  # unlike Path.is_file, it takes any text


def choose(kind: str, given: str | Path) -> Path:
    """Return the path that a person gave, or if nothing is there what comes with lsmoe_ds by that name, and
    say so.
    """
    found = None if os.path.exists(given) else find(kind, given)
    if found is None:
        return Path(given)
    if guess_rank(os.environ) == 0:
        print(
            f"lsmoe: there is no file {given} here: taking the {kind} that comes with lsmoe_ds, {found}",
            file=sys.stderr,
        )
    return found


def hint(kind: str) -> str:
    """Return what an error says where nothing is found."""
    return f": give a file, or one that comes with lsmoe_ds: {', '.join(names(kind))}"
