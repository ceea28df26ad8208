"""Score with COMET, if the package `unbabel-comet` and a checkpoint on disk exist; nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lsmoe_ds.errors import UserError
from lsmoe_ds.evaluation.direction_scores import DirectionScore
from lsmoe_ds.folders import sha256

BATCH = 16
CHECKPOINT = Path("checkpoints", "model.ckpt")  # where COMET's download puts it in its folder


@dataclass(frozen=True)
class Comet:
    """A checkpoint of COMET. ``name`` begins with "comet-" and ends with the start of the file's sha256."""

    path: Path
    name: str

    @classmethod
    def open(cls, path: str | Path) -> Comet:
        """Find a checkpoint and load it. Raises UserError if that is not possible."""
        comet = cls.find(path)
        _ = comet.model
        return comet

    @classmethod
    def find(cls, path: str | Path) -> Comet:
        """Find a checkpoint without loading it: a file, or the folder around ``checkpoints/model.ckpt``.

        Raises UserError if COMET is not installed or there is no such file.
        """
        if importlib.util.find_spec("comet") is None:
            raise UserError(
                "--comet needs the package unbabel-comet, which is not installed: pip install unbabel-comet"
            )
        found = Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)
        if not found.is_file():
            raise UserError(
                f"--comet {path}: there is no checkpoint {found}: give a model.ckpt or the folder around "
                f"{CHECKPOINT}"
            )
        return cls(found, f"comet-{sha256(found)[:12]}")

    @cached_property
    def model(self) -> Any:
        try:
            return importlib.import_module("comet").load_from_checkpoint(str(self.path))
        except Exception as error:  # COMET, lightning and transformers raise many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"--comet {self.path} cannot be loaded: {reason}") from None

    def score(self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str]) -> float:
        """Compute the system score of N translations: the mean of their segment scores."""
        import torch  # here, because merging parts imports this module and needs no torch

        triples = zip(sources, hypotheses, references, strict=True)
        samples = [
            {"src": source, "mt": hypothesis, "ref": reference} for source, hypothesis, reference in triples
        ]
        found = self.model.predict(
            samples, batch_size=BATCH, gpus=int(torch.cuda.is_available()), progress_bar=False
        )
        return float(found.system_score)

    def add(self, score: DirectionScore, *text: Sequence[str]) -> DirectionScore:
        """Add the system score of a direction, whose ``text`` is sources, hypotheses and references."""
        return replace(score, comet=self.score(*text), signatures={**score.signatures, "comet": self.name})
