"""The section ``moe`` of a side: experts in place of feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lsmoe_ds.config.section import Fraction, Positive, Section
from lsmoe_ds.directions import Languages
from lsmoe_ds.errors import UserError
from lsmoe_ds.notices import counted


class Capacity(Section):
    """Limit each expert to ``ceil(factor x top_k x tokens / experts)`` tokens of a batch, and drop the rest.

    ``training`` and ``evaluation`` are the factors. Without a factor for evaluation nothing is dropped there,
    and a translation does not depend on the rest of its batch. ``drop`` says which choices an expert keeps:
    those of the highest ``probability``, or the first by ``position`` (GShard: all first choices come before
    all second ones).
    """

    training: Annotated[float, Field(gt=0.0)] = 1.25
    evaluation: Annotated[float, Field(gt=0.0)] | None = None
    drop: Literal["probability", "position"] = "probability"


class MoE(Section):
    """Replace the feed-forward of every ``every``-th layer by ``experts`` experts, of which each token uses
    ``top_k``.

    ``routing`` says what chooses the experts of a token ("Beyond Distillation", section 3.1): its own hidden
    state (``token``), the mean hidden state of its sentence (``sentence``), or its ``task``: the target
    language, the source language or the pair. With ``static`` the experts of each task are fixed. With
    ``expert_groups`` G the experts form G equal groups. Each task is assigned to one of them, related
    languages to the same one, and chooses only its experts: in task-affine batches all experts of a token are
    then on its own rank. With ``fuse_distillation`` the layer has one more feed-forward, of the same width,
    which all languages share and which learns from the experts ("Condensing Multilingual Knowledge", section
    3.1).

    ``replicas`` are tasks whose experts every expert-parallel rank computes itself, with a copy of the
    weights: a list of tasks, or ``auto``, the tasks that would overload a rank
    (:func:`lsmoe_ds.data.shares.busy_tasks`). With ``chunks`` above 1, training sends the rows for other
    ranks in that many parts, and computes one part while the next travels.
    """

    renamed: ClassVar[Mapping[str, str]] = {"balance": "balance_loss_weight", "z_loss": "z_loss_weight"}

    experts: Positive
    every: Positive = 2
    top_k: Positive = 2
    routing: Literal["token", "sentence", "task", "static"] = "token"
    task: Literal["target", "source", "pair"] = "target"
    expert_groups: Positive = 1
    balance_loss_weight: Annotated[float, Field(ge=0.0)] = 0.01
    z_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    jitter: Fraction = 0.0
    router_bias: bool = False
    capacity: Capacity | None = None
    fuse_distillation: bool = False
    replicas: Literal["auto"] | list[str] | None = None
    chunks: Annotated[int, Field(ge=1, le=16)] = 1

    @property
    def has_shared(self) -> bool:
        """Tell whether the layer also has a feed-forward that all languages share."""
        return self.fuse_distillation

    def served(self) -> MoE:
        """Return the same without the parts only for training: shared feed-forward, replicas, chunks."""
        return self.model_copy(update={"fuse_distillation": False, "replicas": None, "chunks": 1})

    def replicated(self, languages: Languages) -> list[int]:
        """Return the numbers of the tasks whose experts have replicas, ascending.

        Raises UserError if one is no task of these languages, or if the tasks are not yet known (``auto``).
        """
        if self.replicas == "auto":
            raise UserError(
                "'moe.replicas' is auto, which the prepared data decide: "
                "lsmoe_ds.data.shares.with_named_replicas puts the names of tasks in its place"
            )
        return sorted({languages.task_named(self.task, name) for name in self.replicas or ()})

    @property
    def by_task(self) -> bool:
        """Whether all tokens of a task use the same experts."""
        return self.routing in ("task", "static")

    @model_validator(mode="after")
    def _experts(self) -> MoE:
        if self.experts % self.expert_groups:
            experts = counted(self.experts, "expert")
            raise ValueError(f"'expert_groups' is {self.expert_groups}, which does not divide the {experts}")
        if self.expert_groups > 1 and not self.by_task:
            raise ValueError(
                f"'expert_groups' is {self.expert_groups}, but with 'routing: {self.routing}' there are no "
                "tasks to assign to them"
            )
        if self.jitter and self.by_task:
            raise ValueError(
                f"'jitter' is {self.jitter}, but 'routing: {self.routing}' does not read the token states, "
                "to which jitter adds noise: leave it out"
            )
        if self.router_bias and self.by_task:
            raise ValueError(
                f"'router_bias' is true, but 'routing: {self.routing}' has no linear router to add it to: "
                "leave it out"
            )
        if self.replicas is not None and not self.by_task:
            raise ValueError(
                f"'replicas' is {self.replicas}, but with 'routing: {self.routing}' no task has experts of "
                "its own, and what an expert gets is not known before a batch is there: leave it out, or "
                "set 'routing' to task or static"
            )
        each = self.experts // self.expert_groups
        if self.top_k > each:
            of_group = " of a group" if self.expert_groups > 1 else ""
            raise ValueError(f"'top_k' is {self.top_k}, more than the {counted(each, 'expert')}{of_group}")
        return self
