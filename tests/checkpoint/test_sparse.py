"""Tensors with many zeros are stored by what is left, and read as they were."""

from __future__ import annotations

import pytest
import torch

from lsmoe_ds.checkpoint.sparse import BITS, SHAPE, VALUES, pack, unpack
from lsmoe_ds.errors import UserError


def file_of(folder, state, as_given: bool = False):
    path = folder / "state.pt"
    torch.save(state if as_given else pack(state), path)
    return path


def read(path):
    return unpack(torch.load(path, weights_only=True), path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_every_value_comes_back(tmp_path, dtype, left):
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(13, 11, generator=generator).to(dtype)
    value *= torch.rand(13, 11, generator=generator) < left
    state = {"module": {"a": value, "b": [value.t(), torch.tensor(3)]}, "step": 7, "mask": value != 0}
    found = read(file_of(tmp_path, state))
    assert found["step"] == 7 and torch.equal(found["mask"], value != 0)
    for given, wanted in ((found["module"]["a"], value), (found["module"]["b"][0], value.t())):
        assert given.dtype == dtype and torch.equal(given, wanted)
        assert torch.equal(torch.signbit(given), torch.signbit(wanted)), "-0.0 is not 0.0"


def test_a_pruned_matrix_takes_the_space_of_what_is_left(tmp_path):
    value = torch.randn(1000, 100)
    value[100:] = 0
    size = file_of(tmp_path, {"value": value, "mask": value != 0}).stat().st_size
    assert size < 0.1 * value.nbytes + 2 * value.numel() / 8 + 4000


def test_what_has_few_zeros_stays_as_it_is():
    value = torch.ones(100)
    assert pack({"a": value})["a"] is value
    assert pack(torch.zeros(8)).shape == (8,), "too small"
    assert pack(torch.zeros(100, dtype=torch.int64)).dtype == torch.int64


PACKED = {SHAPE: [8, 8], BITS: torch.zeros(8, dtype=torch.uint8), VALUES: torch.zeros(0)}
DAMAGED = {
    "shape": {SHAPE: [-1, 8]},
    "no shape": {SHAPE: "8"},
    "more bits": {BITS: torch.zeros(9, dtype=torch.uint8)},
    "bits of another type": {BITS: torch.zeros(8)},
    "more values": {VALUES: torch.zeros(1)},
    "fewer values": {BITS: torch.full((8,), 255, dtype=torch.uint8)},
    "strides of 0": {VALUES: torch.zeros(1).expand(2**40)},
}


@pytest.mark.parametrize("wrong", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_told(tmp_path, wrong):
    assert torch.equal(read(file_of(tmp_path, {"a": PACKED}, as_given=True))["a"], torch.zeros(8, 8))
    path = file_of(tmp_path, {"a": PACKED | wrong}, as_given=True)
    with pytest.raises(UserError, match="is damaged"):
        read(path)
