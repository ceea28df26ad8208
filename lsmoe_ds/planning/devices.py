"""What GPUs can do, by their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Device:
    """The limits of one GPU. Rates are per second."""

    memory: float  # bytes
    flops: float  # in bfloat16 with float32 sums, dense
    memory_rate: float  # bytes between memory and chip
    link_rate: float  # bytes to the other GPUs of its node, in one direction


DEVICES = {
    "v100": Device(32 * GB, 125e12, 900e9, 150e9),
    "a100-40gb": Device(40 * GB, 312e12, 1555e9, 300e9),
    "a100": Device(80 * GB, 312e12, 2039e9, 300e9),
    "l40s": Device(48 * GB, 362e12, 864e9, 32e9),
    "h100": Device(80 * GB, 989e12, 3350e9, 450e9),
    "h100-pcie": Device(80 * GB, 756e12, 2000e9, 64e9),
    "h200": Device(141 * GB, 989e12, 4800e9, 450e9),
    "b200": Device(180 * GB, 2250e12, 7700e9, 900e9),
}
