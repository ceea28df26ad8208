"""Routers: which experts a token uses, and with which weights.

A router maps tokens [S, H] and the task of each token [S] to the numbers of K experts [S, K], their weights [S, K] and
the probabilities of all experts [S, E] ("Beyond Distillation", section 3.1):

- token:  probabilities = softmax(W x_s)           each token routes by itself
- task:   probabilities = softmax(W[task_s])       all tokens of a task route alike, so one task's experts can be taken out

S tokens, H hidden, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lsmoe_ds.config import MoE
from lsmoe_ds.languages import Languages


@dataclass
class Routes:
    experts: Tensor  # [S, K] int64
    weights: Tensor  # [S, K], each row sums to 1 for K > 1
    probabilities: Tensor  # [S, E], float32


def choose(logits: Tensor, top_k: int) -> Routes:
    """The ``top_k`` most probable experts of each row of [S, E].

    For K > 1 their weights are their probabilities scaled to sum to 1 (GShard); for K = 1 the weight is the probability
    itself (Switch), without which the router would get no gradient.
    """
    probabilities = logits.float().softmax(-1)
    weights, experts = probabilities.topk(top_k, -1)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routes(experts, weights.to(logits.dtype), probabilities)


class TokenRouter(nn.Module):
    """Each token chooses by its own hidden state."""

    def __init__(self, hidden: int, settings: MoE, languages: Languages) -> None:
        super().__init__()
        self.top_k = settings.top_k
        self.weight = nn.Parameter(torch.empty(settings.experts, hidden))

    def forward(self, tokens: Tensor, tasks: Tensor) -> Routes:
        return choose(nn.functional.linear(tokens, self.weight), self.top_k)


class TaskRouter(nn.Module):
    """The task (target language, or pair) chooses; the weight has one row of expert logits for each task, [tasks, E]."""

    def __init__(self, hidden: int, settings: MoE, languages: Languages) -> None:
        super().__init__()
        self.top_k = settings.top_k
        self.weight = nn.Parameter(torch.empty(len(languages.tasks(settings.task)), settings.experts))

    def forward(self, tokens: Tensor, tasks: Tensor) -> Routes:
        # Chosen once for each task, then spread over its tokens.
        of_task = choose(self.weight, self.top_k)
        return Routes(of_task.experts[tasks], of_task.weights[tasks], of_task.probabilities[tasks])


ROUTERS: dict[str, type[nn.Module]] = {"token": TokenRouter, "task": TaskRouter}
