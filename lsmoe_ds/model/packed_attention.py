"""Attention between packed sentences.

N query rows, M key rows, A heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsmoe_ds.methods.packing import Packing


@cache
def variable_length_kernel() -> Callable[..., Tensor] | None:
    """Return torch's flash attention for sentences of different lengths; None before torch 2.10.

    It has no dropout and takes 16-bit numbers on a GPU.
    """
    try:
        attend: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return attend


def has_kernel(query: Tensor, dropout: float) -> bool:
    """Tell whether the kernel can attend from these queries [N, A, 1, D].

    It needs Ampere or a newer GPU, and D in multiples of 8, to which padded attention would fill it up.
    """
    fits = (
        query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] % 8 == 0 and query.shape[3] <= 256
    )
    if dropout or not fits or not query.is_cuda or variable_length_kernel() is None:
        return False
    return torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing, dropout: float, causal: bool
) -> Tensor:
    """Attend from each sentence's queries [N, A, 1, D] to its keys and values [M, A, 1, D]: [N, A, 1, D].

    Where there is no kernel for it, the rows return to padded sentences for this one operation.
    """
    if has_kernel(query, dropout):
        attend = variable_length_kernel()
        assert attend is not None
        rows = query.squeeze(2), key.squeeze(2), value.squeeze(2)
        sizes = queries.starts, keys.starts, queries.longest, keys.longest
        return attend(*rows, *sizes, **_causal(attend, causal)).unsqueeze(2)

    def pad(packing: Packing, rows: Tensor) -> Tensor:
        return packing.unpack(rows.transpose(1, 2)).transpose(1, 2)

    padded = pad(queries, query), pad(keys, key), pad(keys, value)
    # The causal mask hides the padding at the end from every real position.
    mask = None if causal else keys.real[:, None, None, :]
    mixed = F.scaled_dot_product_attention(*padded, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return queries.pack(mixed.transpose(1, 2)).transpose(1, 2)


def _causal(attend: Callable[..., Tensor], causal: bool) -> dict[str, Any]:
    """Return the argument that asks for a causal mask: torch 2.10 and later versions name it differently."""
    if "is_causal" in inspect.signature(attend).parameters:
        return {"is_causal": causal}
    return {"window_size": (-1, 0)} if causal else {}
