"""Read users' recipes. A model of Hugging Face that cannot be a host is imported first; only then torch is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lsmoe_ds.config.file import Wanted, load_recipe
from lsmoe_ds.config.host import CONFIG, TRANSLATORS
from lsmoe_ds.config.host_origin import CONVERTED
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import check_can_write, is_huggingface, locked, read_json, sha256
from lsmoe_ds.notices import notice

SUFFIX = "-imported"  # of the folder for the imported form, beside the model's own
FILES = "imported_files"  # in its provenance: size, modification time and sha256 of each file that was read


def open_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    changed_by: str = "this command",
) -> Recipe:
    """Read a user's recipe (:func:`load_recipe`).

    If its ``model.huggingface`` is an M2M-100 or NLLB, that is imported first, unless it already is; the
    returned recipe then starts training from the imported folder.
    """
    return load_recipe(path, overrides, changes, changed_by, import_once)


def import_once(folder: Path, wanted: Wanted) -> Path | None:
    """Import the model in ``folder`` into a folder beside it, unless that exists and is up to date.

    Returns the new folder, or None for a model that is not imported. Several processes may call this at once.
    Raises UserError for a wrong recipe, a damaged folder, or a parent folder that cannot be written.
    """
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:  # the root folder
        return None
    out = folder.with_name(f"{folder.name}{SUFFIX}")
    if not folder.exists() and _imported_files(out) is not None:
        return out  # it was made from the same files
    config = read_json(folder / CONFIG) or {}
    if not is_huggingface(folder) or config.get("model_type") not in TRANSLATORS:
        return None
    if _is_of(out, folder):
        return out
    if out.exists() and "imported_from" not in (read_json(out / CONVERTED) or {}):
        raise UserError(f"it would be imported as {out}, which exists and is no imported model: rename that")
    check_can_write(
        folder.parent, f"`lsmoe convert {folder} --as consolidated --out DIR` imports it elsewhere", False
    )
    with locked(folder, wait=True):  # not `out`, which writing locks
        if not _is_of(out, folder):
            from lsmoe_ds.convert.imported import import_model
            from lsmoe_ds.export.importing import Asked, sizes_of

            wanted.check(sizes_of(folder))
            _check_replaceable(folder, out)
            notice(f"importing {folder} as {out}, in the form of lsmoe_ds; later commands use that")
            import_model(folder, "consolidated", Asked(data=wanted.data, places=wanted.places), out)
    return out


def describe(folder: Path) -> dict[str, list[int | str]]:
    """Return the size, the time of the last change and the sha256 of each file in a folder."""
    return {name: [*stamp, sha256(folder / name)] for name, stamp in _stamps(folder).items()}


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Return the size and the time of the last change of each file in a folder."""
    found = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {name: [each.st_size, each.st_mtime_ns] for name, each in found.items()}


def _is_of(out: Path, folder: Path) -> bool:
    """Tell whether a folder was imported from these files. Those with other times, as of copies, are read."""
    known, now = _imported_files(out), _stamps(folder)
    if not isinstance(known, dict) or known.keys() != now.keys():
        return False
    moved = [name for name, stamp in now.items() if known[name][:2] != stamp]
    same_sizes = all(known[name][0] == now[name][0] for name in moved)
    return same_sizes and all(known[name][2:] == [sha256(folder / name)] for name in moved)


def _check_replaceable(folder: Path, out: Path) -> None:
    """Raise UserError if an earlier import has files beside it, such as scores, which would be lost."""
    from lsmoe_ds.checkpoint.stored import check_writable

    try:
        check_writable(out)
    except UserError as error:
        what = str(error).partition(", which")[0]
        raise UserError(
            f"{folder} has changed since it was imported, and {what}: move {out} away, and it is imported "
            "again"
        ) from None


def _imported_files(folder: Path) -> Any:
    return (read_json(folder / CONVERTED) or {}).get(FILES)
