"""Routers: which experts a token uses, and with which weights ("Beyond Distillation", section 3.1).

- token:     softmax(W x_s)            each token chooses by its own hidden state
- sentence:  softmax(W mean_s(x_s))    all tokens of a sentence choose alike, by their mean
- task:      softmax(W[task_s])        all tokens of a task choose alike, so its experts can be extracted
- static:    each task is assigned K experts, with weights 1 / K; nothing is learned

With ``router_bias``, routers that read tokens or sentences add a bias b [E] to W x. All routers compute in
float32, whatever the types of x and W: in 16 bits, nearly equal logits would become equal, and the choice of
expert would be arbitrary (Switch, section 2.4).

S tokens, B sentences, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lsmoe_ds.config.moe import Capacity, MoE
from lsmoe_ds.directions import Languages
from lsmoe_ds.moe.load import assign

DROPPED = -1


@dataclass
class Routes:
    """The experts that each of S tokens chose, and their weights."""

    experts: Tensor  # [S, K] int64, or DROPPED where an expert was full
    weights: Tensor  # [S, K]; with K > 1 each row sums to 1 before choices are dropped; 0 where dropped
    probabilities: Tensor  # [S, E], float32
    log_sums: Tensor  # [S], float32: log sum_e exp(logit_e), which the z-loss keeps small

    def of(self, index: Tensor) -> Routes:
        """Return the routes of the rows in ``index``."""
        parts = (self.experts, self.weights, self.probabilities, self.log_sums)
        return Routes(*(part.index_select(0, index) for part in parts))


@dataclass
class RouterInputs:
    """The sentence and the task of each of S routed tokens, and a summary of each of B sentences."""

    sentences: Tensor  # [S]: the sentence that each token is from
    tasks: Tensor  # [S]
    summary: Tensor | None = None  # [B, H]: only sentence routing reads it


def choose(logits: Tensor, top_k: int) -> Routes:
    """Choose the ``top_k`` most probable experts for each row of ``logits`` [S, E].

    For K > 1 the weights are the probabilities, scaled to sum to 1 (GShard). For K = 1 the weight is the
    probability itself (Switch); otherwise the router would get no gradient.
    """
    logits = logits.float()
    probabilities = logits.softmax(-1)
    weights, experts = probabilities.topk(top_k, -1)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routes(experts, weights, probabilities, logits.logsumexp(-1))


def count(numbers: Tensor, size: int) -> Tensor:
    """Count each of 0 ... size - 1 among int64 ``numbers`` [S]: [size]. Does not wait for the device."""
    return numbers.new_zeros(size).scatter_add_(0, numbers, torch.ones_like(numbers))


def limit(routes: Routes, settings: Capacity, factor: float) -> Routes:
    """Drop choices so that each expert has at most ``ceil(factor K S / E)`` tokens.

    S counts the tokens of one batch, however many ranks share it, so the same choices are dropped in every
    parallel layout. The weights of a token's other experts do not change (GShard, algorithm 1).
    """
    tokens, top_k = routes.experts.shape
    experts = routes.probabilities.shape[1]
    capacity = -int(-factor * top_k * tokens // experts)
    flat = routes.experts.t().reshape(-1)  # all first choices, then all second ones
    order = torch.arange(flat.shape[0], device=flat.device)
    if settings.drop == "probability":
        order = routes.weights.detach().t().reshape(-1).argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]  # by expert, the choices to keep first
    sizes = count(flat, experts)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(flat.shape[0], device=flat.device) - starts[flat[order]]
    kept = (rank < capacity).view(top_k, tokens).t()
    return replace(routes, experts=routes.experts.masked_fill(~kept, DROPPED), weights=routes.weights * kept)


class Router(nn.Module):
    """Choose experts for tokens: ``forward(tokens [S, H], inputs)`` returns :class:`Routes`."""

    reads_tokens = True  # true: the choice depends on hidden states; false: on the task alone

    def __init__(self, hidden: int, settings: MoE, languages: Languages) -> None:
        super().__init__()
        self.top_k, self.jitter = settings.top_k, settings.jitter

    def _shake(self, x: Tensor) -> Tensor:
        """Multiply by uniform noise in [1 - jitter, 1 + jitter] in training (Switch, section 2.4)."""
        if not self.jitter or not self.training:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)


class TokenRouter(Router):
    """Let each token choose by its own hidden state."""

    def __init__(self, hidden: int, settings: MoE, languages: Languages) -> None:
        super().__init__(hidden, settings, languages)
        self.weight = nn.Parameter(torch.empty(settings.experts, hidden))
        self.bias = nn.Parameter(torch.empty(settings.experts)) if settings.router_bias else None

    def forward(self, tokens: Tensor, inputs: RouterInputs) -> Routes:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(tokens.device.type, enabled=False):  # autocast would compute products in 16 bits
            logits = nn.functional.linear(self._shake(tokens.float()), self.weight.float(), bias)
        return choose(logits, self.top_k)


class SentenceRouter(TokenRouter):
    """Let all tokens of a sentence choose by its summary.

    In the encoder the summary is the mean of the sentence's real tokens at this layer. In the decoder it is
    the mean of the *encoder's output*, because a mean over decoder positions would include future tokens.
    """

    def forward(self, tokens: Tensor, inputs: RouterInputs) -> Routes:
        assert inputs.summary is not None
        return super().forward(inputs.summary, inputs).of(inputs.sentences)


class _OnDevices:
    """A constant tensor that is copied to each device only once, because each copy waits for the device.

    It is not a buffer of the module, since a module built on the meta device would have a meta buffer.
    """

    def __init__(self, value: Tensor) -> None:
        self._copies = {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = next(iter(self._copies.values())).to(device)
        return self._copies[device]


class RouterByTask(Router):
    """A router that reads only the task and has one row of routes for each task."""

    reads_tokens = False

    def of_tasks(self) -> Routes:
        """Return one row of routes for each task, [tasks, K]."""
        raise NotImplementedError

    @torch.no_grad()
    def experts_of(self, tasks: Sequence[int]) -> list[int]:
        """Return the experts that any of these tasks uses now, ascending. Waits for the device."""
        chosen: list[list[int]] = self.of_tasks().experts[list(tasks)].tolist()
        return sorted({expert for of_task in chosen for expert in of_task})

    def forward(self, tokens: Tensor, inputs: RouterInputs) -> Routes:
        return self.of_tasks().of(inputs.tasks)


class TaskRouter(RouterByTask):
    """Choose by learned expert logits of each task, [tasks, E].

    If the experts are divided into groups, experts outside the task's group have probability 0.
    """

    def __init__(self, hidden: int, settings: MoE, languages: Languages) -> None:
        super().__init__(hidden, settings, languages)
        self.weight = nn.Parameter(torch.empty(len(languages.tasks(settings.task)), settings.experts))
        self._outside: _OnDevices | None = None  # [tasks, E]: whether an expert is outside the task's group
        if settings.expert_groups > 1:
            groups = torch.tensor(
                languages.task_groups(settings.task, settings.expert_groups), device=torch.device("cpu")
            )
            each = settings.experts // settings.expert_groups
            own = torch.arange(settings.experts, device=groups.device) // each
            self._outside = _OnDevices(groups[:, None] != own)

    def logits(self) -> Tensor:
        """Return the expert logits of all tasks [tasks, E], minus infinity outside a task's group."""
        if self._outside is None:
            return self.weight
        return self.weight.masked_fill(self._outside.on(self.weight.device), -torch.inf)

    def of_tasks(self) -> Routes:
        return choose(self.logits(), self.top_k)


class StaticRouter(RouterByTask):
    """Assign to each task of a group the next K experts of the group, cyclically."""

    def __init__(self, hidden: int, settings: MoE, languages: Languages) -> None:
        super().__init__(hidden, settings, languages)
        self._chosen = _OnDevices(torch.tensor(assign(settings, languages), device=torch.device("cpu")))
        self.experts = settings.experts

    def of_tasks(self, device: torch.device | None = None) -> Routes:
        chosen = self._chosen.on(device or torch.device("cpu"))  # [tasks, K]
        weights = torch.full(chosen.shape, 1 / self.top_k, device=chosen.device)
        probabilities = weights.new_zeros(chosen.shape[0], self.experts).scatter_(1, chosen, weights)
        return Routes(chosen, weights, probabilities, weights.new_zeros(chosen.shape[0]))

    def forward(self, tokens: Tensor, inputs: RouterInputs) -> Routes:
        return self.of_tasks(inputs.tasks.device).of(inputs.tasks)


ROUTERS: dict[str, type[Router]] = {
    "token": TokenRouter,
    "sentence": SentenceRouter,
    "task": TaskRouter,
    "static": StaticRouter,
}
