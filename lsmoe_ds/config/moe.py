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
    """At most ``ceil(factor x top_k x tokens / experts)`` tokens of one batch for each expert; what is over
    is dropped.

    ``training`` and ``evaluation`` are the factors; without one for evaluation nothing is dropped there, and
    a translation does not depend on what else is in the batch. ``drop`` keeps the choices of highest
    ``probability``, or those of first ``position`` (GShard: all first choices come before all second ones).
    """

    training: Annotated[float, Field(gt=0.0)] = 1.25
    evaluation: Annotated[float, Field(gt=0.0)] | None = None
    drop: Literal["probability", "position"] = "probability"


class MoE(Section):
    """Every ``every``-th layer's feed-forward becomes ``experts`` experts, of which each token uses
    ``top_k``.

    ``routing`` says who chooses ("Beyond Distillation", section 3.1): each ``token``, the mean of the
    ``sentence``, the ``task`` (target language, source language or pair), or nobody: ``static`` assigns the
    tasks to the experts. With ``expert_groups`` G the experts stand in G equal groups, and the tasks are
    assigned to them, relatives together: a task chooses within its own group, so that task-affine batches
    find their experts at home. With ``fuse_distillation`` one more feed-forward of the same width stands
    beside the experts, which all languages share and which learns from them ("Condensing Multilingual
    Knowledge", section 3.1).

    ``replicas`` are the tasks whose experts every expert-parallel rank computes itself, with weights that it
    borrows from their owner: a list of tasks, or ``auto``, those by which a rank would carry too much
    (:func:`lsmoe_ds.data.shares.busy_tasks`).
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

    @property
    def has_shared(self) -> bool:
        """Tell whether the layer also has a feed-forward that all languages share."""
        return self.fuse_distillation

    def served(self) -> MoE:
        """Return the same without what only training has: the shared feed-forward and replicas."""
        return self.model_copy(update={"fuse_distillation": False, "replicas": None})

    def replicated(self, languages: Languages) -> list[int]:
        """Return the numbers of the tasks whose experts have replicas, ascending.

        Raises UserError if one is no task of these languages, or if they are not known yet (``auto``).
        """
        if self.replicas == "auto":
            raise UserError(
                "'moe.replicas' is auto, which the prepared data decide: "
                "lsmoe_ds.data.shares.with_named_replicas puts the names of tasks in its place"
            )
        return sorted({languages.task_named(self.task, name) for name in self.replicas or ()})

    @property
    def by_task(self) -> bool:
        """Whether all tokens of a task use the same experts, whatever they are."""
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
                f"'jitter' is {self.jitter}, but 'routing: {self.routing}' reads nothing that it could shake"
            )
        if self.router_bias and self.by_task:
            raise ValueError(f"'router_bias' is true, but 'routing: {self.routing}' has nothing to add it to")
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
