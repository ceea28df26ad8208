"""Measure a training's FLOP/s, and compare them with the peak of its devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.data.batches import Step
from lsmoe_ds.parallel.topology import Topology
from lsmoe_ds.planning.arithmetic import Flops, flops
from lsmoe_ds.planning.devices import find_device
from lsmoe_ds.planning.trained import trains
from lsmoe_ds.training.engine import check_precision


@dataclass(frozen=True)
class Work:
    """The tokens and sentences of some steps, over all ranks, without padding."""

    source: int = 0
    target: int = 0  # labels
    given: int = 0  # tags that the decoder reads in addition
    sentences: int = 0

    def __add__(self, step: Step) -> Work:
        return Work(
            self.source + step.source_tokens,
            self.target + step.target_tokens,
            self.given + step.given_tokens,
            self.sentences + step.sentences,
        )

    @property
    def tokens(self) -> int:
        return self.source + self.target

    @property
    def length(self) -> int:
        """Return the mean number of tokens of a sentence, over both sides."""
        return max(1, round((self.tokens + self.given) / max(1, 2 * self.sentences)))


def find_peak(name: str, half: bool, tf32: bool = False) -> float | None:
    """Return the peak FLOP/s of a CUDA device of this name, in 16 bits or in float32.

    With ``tf32``, float32 matrix products run at half the 16-bit speed. None for a device that is not in the
    table, or a part of a device (MIG).
    """
    if (device := find_device(name)) is None:
        return None
    return device.half if half else device.half / 2 if tf32 else device.single


def peak_of(recipe: Recipe, topology: Topology) -> float | None:
    """Return ``training.peak_flops``, or else the known peak of this rank's device; None if it is unknown."""
    if recipe.training.peak_flops is not None:
        return recipe.training.peak_flops
    if topology.device.type != "cuda":
        return None
    major, _ = torch.cuda.get_device_capability(topology.device)
    tf32 = major >= 8 and torch.get_float32_matmul_precision() != "highest"
    return find_peak(torch.cuda.get_device_name(topology.device), check_precision(recipe) is not None, tf32)


class Throughput:
    """The rates of a training on ``world`` ranks, each of which computes at most ``peak`` FLOP/s.

    The FLOPs are those of :func:`lsmoe_ds.planning.arithmetic.flops` that the model needs, without
    recomputation, padding and passes ahead of a step. Every sentence is counted with the mean length.
    """

    def __init__(self, recipe: Recipe, world: int, peak: float | None) -> None:
        # Utilization is of what the model needs, so a layer that is computed again does not count.
        once = recipe.training.model_copy(update={"activation_checkpointing": False})
        self.recipe = recipe.model_copy(update={"training": once})
        self.world, self.peak = world, peak
        self._trained: Callable[[str], bool] | None = None
        self._by_length: dict[int, Flops] = {}

    def flops(self, work: Work) -> float | None:
        """Return the FLOPs of forward and backward passes; None for a model of transformers.

        For those, ``work`` lacks the words around texts, such as prompts.
        """
        if self.recipe.model.huggingface is not None:
            return None
        if self._trained is None:
            # An outline of the model may draw random numbers: keep the training's random state.
            with torch.random.fork_rng(devices=[]):
                self._trained = trains(self.recipe)
        if (each := self._by_length.get(work.length)) is None:
            each = self._by_length[work.length] = flops(self.recipe, work.length, self._trained)
        return work.source * each.source_training + (work.target + work.given) * each.target_training

    def rates(self, work: Work, seconds: float) -> dict[str, float]:
        """Return TFLOP/s per rank and, if the peak is known, model FLOPs utilization (MFU), by name."""
        found = self.flops(work)
        if found is None:
            return {}
        of_rank = found / (seconds * self.world)
        return {"tflops_per_rank": of_rank / 1e12} | ({"mfu": of_rank / self.peak} if self.peak else {})


def describe_rates(rates: dict[str, float]) -> str:
    """Format the rates for a line of the log: `` · 41.3 % MFU``, `` · 12.3 GFLOP/s a rank`` or nothing."""
    if "mfu" in rates:
        return f" · {100 * rates['mfu']:.1f} % MFU"
    if "tflops_per_rank" not in rates:
        return ""
    flops = 1e12 * rates["tflops_per_rank"]
    size, unit = next((each for each in ((1e12, "T"), (1e9, "G")) if flops >= each[0]), (1e6, "M"))
    return f" · {flops / size:.1f} {unit}FLOP/s a rank"
