"""The limits of GPUs, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB = 10**9
HOST_RATE = 25 * GB  # bytes/s between a GPU and its host's memory: PCI Express 4 with 16 lanes


@dataclass(frozen=True)
class Device:
    """The limits of one GPU. Rates are per second."""

    memory: float  # bytes
    memory_rate: float  # bytes between memory and chip
    link_rate: float  # bytes to the other GPUs of its machine, in one direction
    # FLOP/s in 16 bits (bfloat16 or float16 with float32 sums) and in float32. The 16-bit value is the dense
    # one, half of that with 2:4 sparsity in data sheets; the float32 value is that of the CUDA cores.
    half: float
    single: float


def _device(memory: float, memory_rate: float, link_rate: float, half: float, single: float) -> Device:
    """Make a device from GB, GB/s and TFLOP/s."""
    return Device(memory * GB, memory_rate * GB, link_rate * GB, half * 1e12, single * 1e12)


# By words of a CUDA device's name. The first entry whose words all occur in the name is used.
DEVICES: dict[str, Device] = {
    "GB200": _device(186, 8000, 900, 2500, 80),
    "B200": _device(180, 7700, 900, 2250, 75),
    "GH200": _device(96, 4000, 450, 989, 67),
    "H200 NVL": _device(141, 4800, 450, 835, 60),
    "H200": _device(141, 4800, 450, 989, 67),
    "H100 NVL": _device(94, 3900, 300, 835, 60),
    "H100 PCIe": _device(80, 2000, 64, 756, 51),
    "H100": _device(80, 3350, 450, 989, 67),  # SXM; its name does not say so
    "A100": _device(80, 2039, 300, 312, 19.5),
    "A40": _device(48, 696, 32, 149.7, 37.4),
    "L40S": _device(48, 864, 32, 362, 91.6),
    "L40": _device(48, 864, 32, 181, 90.5),
    "L4": _device(24, 300, 32, 121, 30.3),
    "V100-PCIE": _device(32, 900, 16, 112, 14),
    "V100": _device(32, 900, 150, 125, 15.7),
    "T4": _device(16, 320, 16, 65, 8.1),
}


def find_device(name: str) -> Device | None:
    """Find a CUDA device by its name; None if it is unknown, or a part of a device (MIG)."""
    if "MIG" in name.split():
        return None
    return next((device for known, device in DEVICES.items() if re.search(rf"\b{known}\b", name)), None)
