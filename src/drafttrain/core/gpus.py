"""GPUs that a training or a decoding can be planned for: their memory, and how fast they compute and read."""

from __future__ import annotations

from dataclasses import dataclass

from drafttrain.core.peak import peak_tflops

MEMORY_AND_BANDWIDTH = {
    "b200": (180, 8000),
    "h200": (141, 4800),
    "h100": (80, 3350),
    "h100-pcie": (80, 2000),
    "h100-nvl": (94, 3900),
    "h20": (96, 4000),
    "a100-80gb": (80, 2039),
    "a100-40gb": (40, 1555),
    "a40": (48, 696),
    "a30": (24, 933),
    "a10g": (24, 600),
    "l40s": (48, 864),
    "l4": (24, 300),
    "rtx-6000-ada": (48, 960),
    "rtx-a6000": (48, 768),
    "rtx-5090": (32, 1792),
    "rtx-4090": (24, 1008),
    "rtx-3090": (24, 936),
    "t4": (16, 300),
    "mi325x": (256, 6000),
    "mi300x": (192, 5300),
}
"""GB and GB/s of the makers' data sheets; `h100`, `a100-80gb` and `h200` are the SXM ones. Not measured here.

Compared on 2026-11-30 with copies of the data sheets, not with the makers' own files: A100, A40, H100, H200, RTX 3090 and B200 (an
eighth of a DGX B200) with github.com/astroC86/gpu-datasheet; A100, L40S, L4, T4, RTX 4090 with github.com/gmasse/gpu-specs; H100 PCIe
with NVIDIA's product brief PB-11133-001; H100 NVL, RTX A6000, RTX 5090, MI300X, MI325X with pages of resellers and reviewers. H20,
A30, A10G and RTX 6000 Ada are from memory. A card has a little more bytes than its GB say.
"""

RESERVED_BYTES = 2 * 10**9
"""What a GPU's context and the allocator's fragmentation take: 1 to 2 GB."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of the table."""

    name: str

    @property
    def memory_bytes(self) -> int:
        """Its memory."""
        return MEMORY_AND_BANDWIDTH[self.name][0] * 10**9

    @property
    def bandwidth(self) -> float:
        """Bytes that it reads and writes per second."""
        return MEMORY_AND_BANDWIDTH[self.name][1] * 1e9

    @property
    def peak_flops(self) -> float:
        """Dense 16-bit operations per second."""
        peak = peak_tflops(self.name)
        assert peak is not None, "each GPU of this table is in that of peaks too"
        return peak * 1e12

    def holds(self, num_bytes: float) -> bool:
        """Return whether a training with these bytes fits."""
        return num_bytes + RESERVED_BYTES <= self.memory_bytes


def gpu_named(name: str) -> Gpu | None:
    """Return the GPU of a name; None: it is not in the table."""
    known = name.lower().replace(" ", "-")
    return Gpu(known) if known in MEMORY_AND_BANDWIDTH else None
