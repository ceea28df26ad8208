"""Linear layers, embedding and cross-entropy, tensor-parallel through Megatron-core.

With one tensor-parallel rank the same functions return torch's own modules, with the same parameter names and
shapes; they need no process group, and serving a model does not import Megatron. H hidden, V vocabulary, N
tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lsmoe_ds.parallel import compat
from lsmoe_ds.parallel.topology import Topology


class _WithoutTuple(nn.Module):
    """Adapt Megatron's linear layers, which return (output, bias) and have empty extra state."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


def column_linear(inputs: int, outputs: int, topology: Topology) -> nn.Module:
    """Build a column-parallel linear layer, [..., inputs] -> [..., outputs / tensor].

    Each rank computes its share of the outputs.
    """
    if topology.tensor == 1:
        return nn.Linear(inputs, outputs)
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    class ColumnLinear(_WithoutTuple, ColumnParallelLinear):
        def forward(self, x: Tensor) -> Tensor:
            if self.weight.requires_grad and self.bias.requires_grad:
                return super().forward(x)
            # Megatron's layer gives no gradient to a bias beside a frozen weight, and else computes one
            # always.
            copied = copy_to_tensor_model_parallel_region(x)
            out: Tensor = F.linear(copied, self.weight, self.bias)  # type: ignore[arg-type]
            return out

    layer = ColumnLinear(
        inputs,
        outputs,
        config=compat.megatron_config(),
        init_method=nn.init.zeros_,
        bias=True,
        gather_output=False,
    )
    compat.mark_tensor_parallel(layer.weight, 0)
    compat.mark_tensor_parallel(layer.bias, 0)
    return layer


def row_linear(inputs: int, outputs: int, topology: Topology) -> nn.Module:
    """Build a row-parallel linear layer, [..., inputs / tensor] -> [..., outputs].

    One all-reduce adds up the ranks' partial sums.
    """
    if topology.tensor == 1:
        return nn.Linear(inputs, outputs)
    from megatron.core.tensor_parallel import RowParallelLinear

    class RowLinear(_WithoutTuple, RowParallelLinear):
        pass

    layer = RowLinear(
        inputs,
        outputs,
        config=compat.megatron_config(),
        init_method=nn.init.zeros_,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    compat.mark_tensor_parallel(layer.weight, 1)
    return layer


def vocabulary_embedding(size: int, hidden: int, topology: Topology) -> nn.Module:
    """Build an embedding, ids [...] -> [..., H], its rows spread over the tensor-parallel ranks."""
    if topology.tensor == 1:
        return nn.Embedding(size, hidden)
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    layer = VocabParallelEmbedding(size, hidden, init_method=nn.init.zeros_, config=compat.megatron_config())
    compat.mark_tensor_parallel(layer.weight, 0)
    return layer


class Projected(NamedTuple):
    """Hold what the losses of N tokens are computed from."""

    logits: Tensor  # [N, V / tensor], float32: this rank's part of the vocabulary
    # What they are products of; None of logits that a model made in another way.
    hidden: Tensor | None = None  # [N, H]
    copied: Tensor | None = None  # [N, H]: with its gradient summed over the ranks' parts of the vocabulary
    embedding: nn.Module | None = None


def project(hidden: Tensor, embedding: nn.Module, topology: Topology) -> Projected:
    """Apply the output layer, which is the tied ``embedding``, to hidden states [N, H]."""
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    copied = hidden
    if topology.tensor > 1:
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        copied = copy_to_tensor_model_parallel_region(hidden)
    return Projected(F.linear(copied, weight).float(), hidden, copied, embedding)


def cross_entropy(
    projected: Projected, labels: Tensor, smoothing: float, topology: Topology
) -> tuple[Tensor, Tensor]:
    """Return the summed label-smoothed cross-entropy, and each token's negative log-likelihood [N].

    ``labels`` [N]. The second result has no gradient. The smoothed loss is ``(1 - s) nll + s mean_v(-log
    p_v)``, computed as nll plus :func:`smoothing_loss`. (Megatron's own label smoothing averages over the
    local part of the vocabulary only, so its loss changes with the number of ranks.) Do not use the logits
    afterwards: Megatron computes in place.
    """
    if topology.tensor == 1:
        nll = F.cross_entropy(projected.logits, labels, reduction="none")
    else:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        nll = vocab_parallel_cross_entropy(projected.logits, labels)
    loss = nll.sum()
    if smoothing:
        loss = loss + smoothing_loss(projected, labels, smoothing, topology)
    return loss, nll.detach()


def smoothing_loss(projected: Projected, labels: Tensor, smoothing: float, topology: Topology) -> Tensor:
    """Return what label smoothing adds to the summed negative log-likelihood.

    It is the sum over tokens of ``s (z_label - mean_v z_v)``. Where the output layer is linear
    ``z_label = h . E[label]`` and ``mean_v z_v = h . mean_v E_v`` need no pass over the logits.
    """
    logits, hidden, copied, embedding = projected
    if hidden is None or copied is None or embedding is None:
        label_logit = logits.gather(1, labels[:, None]).squeeze(1)
        return smoothing * (label_logit - logits.mean(1)).sum()
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    if topology.tensor == 1:
        mean_logit = (hidden * weight.mean(0)).sum(-1)
    else:
        from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

        part = (copied * (weight.sum(0) / (weight.shape[0] * topology.tensor))).sum(-1)
        mean_logit = reduce_from_tensor_model_parallel_region(part)
    label_logit = (hidden * embedding(labels)).sum(-1)
    loss: Tensor = smoothing * (label_logit - mean_logit).float().sum()
    return loss


def output_logits(hidden: Tensor, embedding: nn.Module, topology: Topology) -> Tensor:
    """Return logits [N, V] of hidden states [N, H] over the whole vocabulary, on every rank; no gradient."""
    logits = F.linear(hidden, embedding.weight)  # type: ignore[arg-type]
    if topology.tensor == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(topology.tensor)]
    dist.all_gather(parts, logits.contiguous(), group=topology.tensor_group)
    return torch.cat(parts, -1)
