"""Peak arithmetic of GPUs, for MFU. Dense bf16 (fp16 where the card has no bf16), without sparsity.

Sources: NVIDIA's data sheets of each product. A card that is not listed gives no MFU rather than a guess.
"""

# Longest match wins, so the more telling names come first. TFLOP/s.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIE", 756.0),
    ("H100 NVL", 835.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("A6000", 154.8),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("V100", 125.0),
    ("L4", 121.0),
    ("T4", 65.0),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of the card NVML or CUDA calls `device_name`, or None if it is unknown.

    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    >>> peak_flops("Radeon") is None
    True
    """
    words = set(device_name.upper().replace("-", " ").split())
    for name, tflops in _PEAKS:
        if set(name.split()) <= words:
            return tflops * 1e12
    return None
