"""Grouped products: multiply rows by the matrix of their group, all groups at once.

The number of kernels does not depend on the number of groups. torch's grouped product needs the rows sorted
by group. Where torch would loop over the groups and wait for the device, the groups are cut into blocks of
equal length, padded with zeros, and a batched product multiplies the blocks.

S rows, G groups, K and N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from math import gcd
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

grouped_mm: Any = getattr(F, "grouped_mm", None)  # since torch 2.10
ALIGNMENT = 16  # bytes; a grouped product needs addresses and strides that are multiples of it
MOST_GROUPS = 1023  # the kernel's limit
BLOCK = 8  # rows; the length of blocks is a multiple of it


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a device has a grouped product for this type that is faster than a loop, and correct."""
    # Elsewhere torch loops over the groups and waits for the device. Blackwell (10) has a kernel, too, but
    # its weight gradient of a group without rows was seen not to be zero. Until that is fixed, use Hopper
    # (9) only.
    return (
        grouped_mm is not None
        and device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device)[0] == 9
    )


def is_grouped(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch's grouped product is better on a device than one padded, batched product."""
    # On a CPU torch's loop neither waits nor copies, and it is not in Python.
    on_cpu = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return has_kernel(device, dtype) or (on_cpu and grouped_mm is not None)


def aligned(columns: int, like: Tensor) -> int:
    """Round columns up to the multiple that grouped products in the type of ``like``, on its device, need."""
    if not is_grouped(like.device, like.dtype):
        return columns
    each = ALIGNMENT // like.element_size()
    return -(-columns // each) * each


def _is_aligned(*tensors: Tensor) -> bool:
    return all(
        tensor.data_ptr() % ALIGNMENT == 0
        and all(tensor.numel() and each * tensor.element_size() % ALIGNMENT == 0 for each in tensor.shape[1:])
        and all(each == 1 or each * tensor.element_size() % ALIGNMENT == 0 for each in tensor.stride())
        for tensor in tensors
    )


class Groups:
    """Describe which of S rows are multiplied by which of G matrices.

    ``spans`` are (matrix, first row, row after the last one) and do not overlap; the products of rows in no
    span are 0. Rows are sorted by matrix, with one exception: if they already form blocks of equal length, as
    sentences do, and copying a matrix of ``rank`` rows for each block costs less than moving its rows.

    Only ``count`` matrices from ``first`` on are read: one if all rows are multiplied by it, otherwise all G.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int, int]],
        matrices: int,
        rows: int,
        device: torch.device,
        rank: int | None = None,
    ) -> None:
        spans = [span for span in spans if span[1] < span[2]]
        used = {matrix for matrix, _, _ in spans}
        self.first, self.count = (used.pop(), 1) if len(used) == 1 else (0, matrices)
        self.rows, self.total = rows, sum(stop - start for _, start, stop in spans)
        self._device, self._parts = device, dict[int, list[tuple[Tensor | slice, slice, Groups]]]()
        by_matrix = sorted(spans)
        self.sizes = [0] * self.count
        for matrix, start, stop in spans:
            self.sizes[matrix - self.first] += stop - start
        self._block: int | None = None  # the length of blocks, if rows form them already
        # The rows that are read, in this order; None if no row has to move.
        self._order = None
        if self.is_all:
            by_row = sorted(spans, key=lambda span: span[1])
            length = gcd(*(stop - start for _, start, stop in spans))
            if self.count > 1 and rank is not None and 2 * rank <= length:
                self._block = length
                self._of_blocks = [each for each, start, stop in by_row for _ in range(start, stop, length)]
            if self._block or by_row == by_matrix:
                return
        self._order = np.concatenate([np.arange(0), *(np.arange(*span[1:]) for span in by_matrix)])

    @property
    def is_all(self) -> bool:
        """Whether every row is in a span."""
        return self.total == self.rows

    @cached_property
    def order(self) -> Tensor:
        """The rows that are in spans, sorted by group."""
        order = np.arange(self.rows) if self._order is None else self._order
        return torch.from_numpy(order).to(self._device)

    @cached_property
    def _back(self) -> Tensor:
        assert self._order is not None
        return torch.from_numpy(np.argsort(self._order)).to(self._device)

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor([*accumulate(self.sizes)], dtype=torch.int32, device=self._device)

    @cached_property
    def _blocks(self) -> tuple[int, Tensor, Tensor | None]:
        """The length of a block, the matrix of each block, and the place of each sorted row in the blocks.

        The last is None if no row has to move.
        """
        if self._block is not None:
            return self._block, torch.tensor(self._of_blocks, device=self._device), None
        used = sum(size > 0 for size in self.sizes)
        length = -(-self.total // (used * BLOCK)) * BLOCK
        counts = [-(-size // length) for size in self.sizes]
        firsts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        places = [first * length + np.arange(size) for first, size in zip(firsts, self.sizes, strict=True)]
        return (
            length,
            torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(self._device),
            torch.from_numpy(np.concatenate(places)).to(self._device),
        )

    def parts(self, most: int) -> list[tuple[Tensor | slice, slice, Groups]]:
        """Split the matrices that are read into parts of at most ``most`` matrices.

        Returns for each part the numbers of its matrices, the slice of their rows among all sorted rows, and
        the groups of these rows.
        """
        if most not in self._parts:
            used = [number for number, size in enumerate(self.sizes) if size]
            found, start = [], 0
            for first in range(0, len(used), most):
                numbers = used[first : first + most]
                ends = [0, *accumulate(self.sizes[number] for number in numbers)]
                spans = [(i, *bounds) for i, bounds in enumerate(pairwise(ends))]
                part = Groups(spans, len(numbers), ends[-1], self._device)
                own = slice(numbers[0] + self.first, numbers[-1] + self.first + 1)  # a slice copies nothing
                is_range = own.stop - own.start == len(numbers)
                index = own if is_range else torch.tensor(numbers, device=self._device)
                found.append((index, slice(start, start + ends[-1]), part))
                start += ends[-1]
            self._parts[most] = found
        return self._parts[most]

    def take(self, rows: Tensor) -> Tensor:
        """Sort rows [S, K] by group, leaving out those in no span."""
        return rows if self._order is None else rows.index_select(0, self.order)

    def put(self, rows: Tensor) -> Tensor:
        """Undo :meth:`take`: return sorted rows to their places, [S, K]; rows in no span are zero."""
        if self._order is None:
            return rows
        if self.is_all:
            return rows.index_select(0, self._back)
        return rows.new_zeros(self.rows, rows.shape[1]).index_copy_(0, self.order, rows)

    def multiply(self, rows: Tensor, matrices: Tensor, transpose: bool = False) -> Tensor:
        """Multiply sorted rows [.., K] by the matrices [``count``, K, N] of their groups: [.., N].

        With ``transpose``, ``matrices`` is [``count``, N, K].
        """
        if self.total == 0:
            return rows.new_zeros(0, matrices.shape[1 if transpose else 2])
        in_blocks = self.count > 1 and not self._is_grouped(rows, matrices)
        if in_blocks:  # before the transposition, so that whole rows are copied
            matrices = matrices.index_select(0, self._blocks[1])
        if transpose:
            matrices = matrices.transpose(1, 2)
        if self.count == 1:
            return rows @ matrices[0]
        if in_blocks:
            products, places = torch.bmm(self._in_blocks(rows), matrices).flatten(0, 1), self._blocks[2]
            return products if places is None else products.index_select(0, places)
        found: Tensor = grouped_mm(rows, matrices, offs=self._ends)
        return found

    def add(self, whole: Tensor, rows: Tensor, matrices: Tensor) -> None:
        """Add the products of :meth:`multiply`, in place, to their rows in ``whole`` [S, N]."""
        if self._order is None and self.count == 1:
            whole.addmm_(rows, matrices[0])
        elif self._block is not None:
            in_blocks, of_blocks = self._in_blocks(whole), self._blocks[1]
            in_blocks.baddbmm_(self._in_blocks(rows), matrices.index_select(0, of_blocks))
        elif self._order is None or (self.is_all and whole.is_cuda):  # CUDA adds by index atomically
            whole.add_(self.put(self.multiply(rows, matrices)))
        else:
            whole.index_add_(0, self.order, self.multiply(rows, matrices))

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum the outer products of sorted rows a [.., K] and b [.., N] by matrix: [``count``, K, N]."""
        if self.count == 1:
            return (a.t() @ b).unsqueeze(0)
        if self.total == 0:
            return a.new_zeros(self.count, a.shape[1], b.shape[1])
        if self._is_grouped(a, b):
            found: Tensor = grouped_mm(a.t(), b, offs=self._ends)
            return found
        products = torch.bmm(self._in_blocks(a).transpose(1, 2), self._in_blocks(b))
        return products.new_zeros(self.count, *products.shape[1:]).index_add_(0, self._blocks[1], products)

    def _is_grouped(self, *tensors: Tensor) -> bool:
        first = tensors[0]
        return (
            self._block is None
            and is_grouped(first.device, first.dtype)
            and _is_aligned(*tensors)
            and (first.device.type == "cpu" or len(self.sizes) <= MOST_GROUPS)
        )

    def _in_blocks(self, rows: Tensor) -> Tensor:
        length, groups, places = self._blocks
        if places is None:
            return rows.unflatten(0, (len(groups), length))
        padded = rows.new_zeros(len(groups) * length, rows.shape[1]).index_copy_(0, places, rows)
        return padded.unflatten(0, (len(groups), length))
