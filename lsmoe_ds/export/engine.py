"""Load a model into torch, or into CTranslate2, for which it is converted if necessary."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lsmoe_ds.checkpoint.averages import Averaging
from lsmoe_ds.checkpoint.stored import READABLE, find_model
from lsmoe_ds.directions import Direction
from lsmoe_ds.errors import UserError
from lsmoe_ds.export.ctranslate2 import write_files
from lsmoe_ds.export.subnetwork import extract_stored
from lsmoe_ds.inference.ctranslate2 import CTranslate2
from lsmoe_ds.inference.engine import Engine
from lsmoe_ds.inference.load import check_route, load
from lsmoe_ds.languages import nearest

ENGINES = ("torch", "ctranslate2")


def load_engine(
    path: str | Path,
    route: str = "specific",
    engine: str | None = None,
    direction: Direction | None = None,
    average: Averaging = 1,
) -> Engine:
    """Load a model into ``engine``, by default the one for which it was converted.

    For CTranslate2, a run or dense folder is converted first, for ``direction``. ``average`` chooses the
    weights of a run. Raises UserError for an impossible path, route, engine or conversion.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"'{engine}' is no engine{nearest(engine, ENGINES)}: choose {' or '.join(ENGINES)}")
    stored = find_model(path)
    if stored.kind == "ctranslate2" and engine != "torch":
        if average != 1:
            raise UserError(f"--average is for the checkpoints of a run: {stored.home} holds one model")
        return CTranslate2.load(stored, check_route(route, stored.recipe))
    if engine != "ctranslate2" or stored.kind not in READABLE:
        return load(path, route=route, average=average)
    tensors, recipe, made = extract_stored(stored, direction, route, average=average)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), tensors, recipe, stored.vocabulary)
        return CTranslate2.open(Path(folder), recipe, stored.vocabulary, int(made["step"]), stored.home)
