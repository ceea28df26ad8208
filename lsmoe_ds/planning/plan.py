"""``lsmoe plan``: compute the costs of a recipe from the recipe alone.

The formulas are in :mod:`lsmoe_ds.planning.costs`, :mod:`lsmoe_ds.planning.arithmetic` and
:mod:`lsmoe_ds.planning.memory`. No model is built and torch is not imported, so planning many billion
parameters is fast and needs little memory. Only if not all parameters train, or if the optimizer keeps
averages over dimensions of methods' parameters, an outline of the model is built for names and shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from lsmoe_ds.config import deepspeed
from lsmoe_ds.config.layout import check_layout
from lsmoe_ds.config.recipe import Recipe
from lsmoe_ds.config.shapes import SideName
from lsmoe_ds.data.groups import with_listed_groups
from lsmoe_ds.data.shares import planned_shares, with_named_replicas
from lsmoe_ds.moe.costs import Exchange, exchanges
from lsmoe_ds.moe.load import Load, loads
from lsmoe_ds.notices import counted, listed
from lsmoe_ds.planning.arithmetic import LENGTH, Flops, flops
from lsmoe_ds.planning.costs import VALUE_BYTES, Parts, outline_of, step_bytes
from lsmoe_ds.planning.memory import Memory, memory
from lsmoe_ds.planning.trained import count_trained

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


UNKNOWN = "memory and arithmetic are not planned: layers of this model are not those of Llama or BERT"


@dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`."""

    name: str
    world: int
    tensor: int
    expert: int
    node: int
    precision: str  # what the recipe's DeepSpeed configuration asks for
    stage: int
    parameters: Parts
    trained: int  # how many of the parameters train
    figures: dict[str, int]  # further counts of parameters by methods
    serving: Parts
    serving_at_most: bool  # whether ``serving`` is an upper bound, because training decides how much is left
    routes: dict[str, Parts]  # what must be loaded to serve all directions by each route; see :func:`routes`
    memory: list[Memory]
    exchanges: list[Exchange]
    step_bytes: int
    step_bytes_home: int | None  # with all batches on their experts' ranks; None if no side can have that
    task_affine: bool  # whether the recipe's batches are task-affine
    loads: list[Load]  # for each side with experts, if these are spread over ranks
    shares_known: bool  # whether each task's share of tokens is known from prepared data
    step_tokens: int  # tokens of one side: half of a step's
    flops: Flops | None  # None if not every matrix of the model is known; the memory is empty then
    alone: SideName | None  # the only side of a one-sided model

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON: counts of parameters, bytes, and floating-point operations."""
        return {
            "name": self.name,
            "layout": {
                "world": self.world,
                "tensor": self.tensor,
                "expert": self.expert,
                "node": self.node,
                "data": self.world // self.tensor,
            },
            "parameters": self.parameters.to_dict(),
            "trained": self.trained,
            "figures": self.figures,
            "serving": self.serving.to_dict(),
            "serving_at_most": self.serving_at_most,
            "routes": {route: parts.to_dict() for route, parts in self.routes.items()},
            "recipe_precision": self.precision,
            "recipe_stage": self.stage,
            "memory": [
                asdict(each) | {"total": each.total, "peak": each.peak, "gpu_peak": each.gpu_peak}
                for each in self.memory
            ],
            "exchanges": [
                asdict(each)
                | {
                    "rows": each.rows.all,
                    "rows_forwarded": each.rows.forwarded,
                    "rows_home": None if each.rows_home is None else each.rows_home.all,
                    "token_bytes": each.token_bytes(),
                    "token_bytes_home": None if each.rows_home is None else each.token_bytes(at_home=True),
                }
                for each in self.exchanges
            ],
            "step_bytes": self.step_bytes,
            "step_bytes_home": self.step_bytes_home,
            "task_affine": self.task_affine,
            "loads": [self._told(each) for each in self.loads],
            "shares_known": self.shares_known,
            "flops": None if self.flops is None else asdict(self.flops),
        }

    def table(self) -> Group:
        """Return the content of :meth:`to_dict` as tables, in human-readable units."""
        from rich.console import Group
        from rich.table import Table

        def table(title: str, *columns: str) -> Table:
            made = Table(title=title, title_justify="left")
            for i, column in enumerate(columns):
                made.add_column(column, justify="right" if i else "left")
            return made

        ranks, data = counted(self.world, "rank"), self.world // self.tensor
        layout = f"{ranks}: tensor {self.tensor}, data {data}, expert {self.expert}"
        forwards = 1 < self.node < self.expert
        layout += f" on machines of {self.node}" * forwards
        unit = "language" if self.alone == "encoder" else "direction"
        routes = [f"all {unit}s, {route} route" for route in self.routes]
        served = f"one {unit} served" + (", at most" if self.serving_at_most else "")
        sizes = table(f"{self.name}: parameters", "part", "whole model", served, *routes)
        counts = [each.to_dict() for each in (self.parameters, self.serving, *self.routes.values())]
        for part in counts[0]:
            is_tied = part == "output" and not counts[0][part]
            sizes.add_row(part, *("tied" if is_tied else human(count[part]) for count in counts))
        if self.trained < self.parameters.whole.total:
            sizes.add_row("of these train", human(self.trained), *("-" for _ in counts[1:]))
        for name, count in self.figures.items():
            sizes.add_row(name, human(count), *("-" for _ in counts[1:]))
        parts = ("weights", "gradients", "optimizer", "total", "activations", "buffers", "peak", "gpu_peak")
        process = in_bytes(self.memory[0].process) if self.memory else ""
        memories = table(
            f"memory of each rank; {layout}; peak with {process} of the process itself",
            "",
            *(part.replace("gpu_peak", "on a GPU") for part in parts),
        )
        if any(each.host for each in self.memory):
            memories.add_column("beside, on the host", justify="right")
        for each in self.memory:
            own = " <- recipe" if (each.precision, each.stage) == (self.precision, self.stage) else ""
            cells = [in_bytes(getattr(each, part)) for part in parts] + [in_bytes(each.host)] * (
                each.host > 0
            )
            memories.add_row(f"{each.precision} ZeRO {each.stage}{own}", *cells)
        made: list[Any] = [sizes, memories] if self.memory else [sizes]
        if self.exchanges:
            columns = (
                "side",
                "layers",
                "rows leaving / token",
                *["within a machine"] * forwards,
                "all at home",
                "bytes / row",
                "bytes / token",
                "all at home",
            )
            traffic = table(f"expert parallelism in {self.precision}: forward and backward", *columns)
            for side in self.exchanges:
                home = ["-", "-"]
                if side.rows_home is not None:
                    home = [
                        f"{side.rows_home.all * (1 - side.at_home):.2f}",
                        in_bytes(side.token_bytes(at_home=True)),
                    ]
                cells = [
                    str(side.layers),
                    f"{side.rows.all * (1 - side.at_home):.2f}",
                    *[f"{side.rows.forwarded * (1 - side.at_home):.2f}"] * forwards,
                    home[0],
                    f"{side.row_bytes:,}",
                    in_bytes(side.token_bytes()),
                    home[1],
                ]
                traffic.add_row(side.side, *cells)
            step = (
                f"one step between all ranks, at most: {in_bytes(self.step_bytes)} with experts chosen at "
                "random"
            )
            if any(each.lent_bytes for each in self.exchanges):
                step += ", with the weights and gradients of replicas"
            if self.step_bytes_home is not None:
                step += f", {in_bytes(self.step_bytes_home)} with all batches at home"
                step += (
                    " (the recipe's are task-affine)"
                    if self.task_affine
                    else " (needs data.batch.languages: task-affine)"
                )
            made += [traffic, step]
        if any(each.placed or each.tasks or each.proposed for each in self.loads):
            made.append(self._table_of_loads(table))
            if not all(each.placed for each in self.loads):
                made.append(
                    "about: the largest task has its experts on one rank, the others are spread evenly"
                )
            made += [line for each in self.loads if (line := self._advice(each))]
        if self.flops is None:
            return Group(*made, UNKNOWN)
        work = table(
            f"floating-point operations of a token, sentences of {self.flops.length}",
            "",
            "forward",
            "of it attention",
            "training",
        )
        names = {"encoder": ("token",), "decoder": ("prompt token", "target token")}
        rows = names[self.alone] if self.alone else ("source token", "target token")
        for name, token in zip(rows, ("source", "target"), strict=False):
            kinds = (token, f"{token}_attention", f"{token}_training")
            work.add_row(name, *(human(getattr(self.flops, kind)) for kind in kinds))
        return Group(*made, work)

    def _told(self, load: Load) -> dict[str, Any]:
        """Return a load for JSON, with the tokens and operations of the busiest rank."""
        found = {key: value for key, value in asdict(load).items() if key != "largest"}
        for key, share in (("", load.busiest), ("_without", load.without)):
            found |= {f"tokens{key}": share * self.step_tokens, f"flops{key}": self._work(load, share)}
        return found

    def _work(self, load: Load, share: float) -> float | None:
        """Return the operations per step of a share of the work of a side's experts."""
        if self.flops is None:
            return None
        each = self.flops.source_experts if load.side == "encoder" else self.flops.target_experts
        return share * self.step_tokens * each

    def _table_of_loads(self, table: Callable[..., Table]) -> Table:
        by = "the prepared data" if self.shares_known else "equally many tokens of each direction"
        title = f"experts' work of the busiest of {self.expert} ranks in one step; tasks by {by}"
        made = table(
            title, "side", "replicas of", "share", "even", "tokens", "operations", "without replicas"
        )
        for each in self.loads:
            about = "" if each.placed else "about "
            work = self._work(each, each.busiest)
            made.add_row(
                each.side,
                ", ".join(each.tasks) or "-",
                f"{about}{each.busiest:.1%}",
                f"{each.even:.1%}",
                human(each.busiest * self.step_tokens),
                "-" if work is None else human(work),
                f"{about}{each.without:.1%}",
            )
        return made

    def _advice(self, load: Load) -> str:
        """Describe what ``replicas: auto`` would choose; empty if that is nothing or replicas are given."""
        if load.tasks or not load.proposed:
            return ""
        about = "" if load.placed else "about "
        return (
            f"model.{load.side}.moe.replicas: auto would replicate the experts of {listed(load.proposed)}: "
            f"{about}{load.with_proposed:.1%} on the busiest rank"
        )


def human(number: float) -> str:
    """Format a count with three digits: ``533M``, ``6.52B``, ``12.3k``."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * limit:
            value = number / limit
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def in_bytes(number: float) -> str:
    """Format bytes: ``4.98 GiB``, ``20.10 KiB``, ``12 B``."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**exponent:
            return f"{number / 2**exponent:.2f} {unit}"
    return f"{number:.0f} B"


def is_known(recipe: Recipe) -> bool:
    """Tell whether memory and arithmetic can be planned for a recipe's model."""
    return recipe.model.huggingface is None or outline_of(recipe).around.is_plain


def routes(recipe: Recipe) -> dict[str, Parts]:
    """Count what must be loaded to serve all directions by each route; empty if that is the whole model."""
    model = recipe.model
    found = {"specific": Parts.of(recipe, held="specific")}
    if model.distills:
        return found | {"shared": Parts.of(recipe, held="shared")}
    return found if Parts.of(recipe, merged=True) != Parts.of(recipe) else {}


def plan(recipe: Recipe, world: int | None = None, length: int = LENGTH) -> Plan:
    """Compute the parameters, memory, traffic and arithmetic of a recipe on ``world`` ranks.

    ``world`` defaults to the smallest number of ranks that can hold the recipe's layout. Raises UserError if
    ``world`` ranks cannot hold the layout or cannot share a step's batches evenly, and if a method depends
    on resource groups that neither the recipe nor prepared data define.
    """
    if recipe.model.needs_groups:
        recipe = with_listed_groups(recipe)
    tensor, expert = recipe.parallel.tensor, recipe.parallel.expert
    world = lcm(tensor, expert) if world is None else world
    check_layout(recipe, world)
    optimizer = recipe.training.optimizer_settings
    given = recipe.deepspeed if isinstance(recipe.deepspeed, dict) else {}
    config = deepspeed.complete(given, world, optimizer.steps_halves)
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    precision = "float32" if deepspeed.precision(config) is None else "bfloat16"
    shares = planned_shares(recipe)
    recipe = with_named_replicas(recipe, shares)
    parts, trained, of_sides = Parts.of(recipe), count_trained(recipe), loads(recipe, shares)
    found = exchanges(recipe, VALUE_BYTES[precision], of_sides)
    known = is_known(recipe)
    homes = any(each.rows_home is not None for each in found)
    return Plan(
        name=recipe.name,
        world=world,
        tensor=tensor,
        expert=expert,
        node=recipe.parallel.node,
        precision=precision,
        stage=stage,
        parameters=parts,
        trained=trained.total,
        figures={
            name: count
            for method in recipe.model.methods
            for name, count in method.figures(recipe.model, recipe.languages).items()
        },
        serving=Parts.of(recipe, serving=True),
        serving_at_most=any(method.served_at_most for method in recipe.model.methods),
        routes=routes(recipe),
        memory=[
            memory(recipe, world, stage, precision, trained)
            for precision in VALUE_BYTES
            for stage in optimizer.stages_in(precision != "float32")
            if known
        ],
        exchanges=found,
        step_bytes=step_bytes(recipe, found, world),
        step_bytes_home=step_bytes(recipe, found, world, at_home=True) if homes else None,
        task_affine=recipe.data.batch.languages == "task-affine",
        loads=of_sides,
        shares_known=shares.known,
        step_tokens=recipe.data.batch.tokens * recipe.data.batch.count // 2,
        flops=flops(recipe, length) if known else None,
        alone=recipe.model.alone,
    )
