"""Linear layers, embedding and output layer, tensor-parallel through Megatron-core.

With one tensor-parallel rank the same functions return torch's own modules, with the same parameter names and
shapes. These need no process group, so serving a model does not import Megatron.

H hidden, V vocabulary, N tokens.
"""

from __future__ import annotations

from typing import Any

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
            # Megatron's layer computes no gradient for a bias if the weight is frozen, and otherwise always
            # computes one.
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


def project(hidden: Tensor, embedding: nn.Module, topology: Topology) -> Tensor:
    """Apply the output layer, the tied ``embedding``, to hidden states [N, H].

    Returns this rank's part of the logits, [N, V / tensor].
    """
    if topology.tensor > 1:
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        hidden = copy_to_tensor_model_parallel_region(hidden)
    logits: Tensor = F.linear(hidden, embedding.weight)  # type: ignore[arg-type]
    return logits


def output_logits(hidden: Tensor, embedding: nn.Module, topology: Topology) -> Tensor:
    """Return logits [N, V] of hidden states [N, H] for the whole vocabulary, on every rank; no gradient."""
    logits = F.linear(hidden, embedding.weight)  # type: ignore[arg-type]
    if topology.tensor == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(topology.tensor)]
    dist.all_gather(parts, logits.contiguous(), group=topology.tensor_group)
    return torch.cat(parts, -1)
