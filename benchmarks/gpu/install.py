"""Check that the libraries find the device, and time its products: the ceiling of every MFU."""

import time

import torch

from benchmarks.gpu.place import Place, output
from benchmarks.gpu.table import Table, number, share
from r1hpc.plan.topology.gpus import peak_flops

_ROUNDS = 20


def run(place: Place) -> list[Table]:
    size = 256 if place.is_small else 8192
    dtypes = (torch.float32,) if place.is_small else (torch.float32, torch.float16, torch.bfloat16)
    rows = [_row(place, dtype, size) for dtype in dtypes]
    header = ("type", "TFLOP/s", "of the dense bf16 peak")
    multiply = Table(f"Multiplying two matrices of {size} x {size}", header, tuple(rows))
    return [_libraries(place), multiply]


def _libraries(place: Place) -> Table:
    """Return the versions and devices that each library finds."""
    import deepspeed

    accelerator = deepspeed.accelerator.get_accelerator()
    smi = output(
        "nvidia-smi", "--query-gpu=name,memory.total,driver_version,mig.mode.current", "--format=csv,noheader"
    )
    rows = [
        ("torch.cuda.is_available()", str(torch.cuda.is_available())),
        ("DeepSpeed's accelerator", accelerator.device_name()),
        ("bf16, fp16 by DeepSpeed", f"{accelerator.is_bf16_supported()}, {accelerator.is_fp16_supported()}"),
        ("GPUs", str(place.num_gpus)),
        ("nvidia-smi", smi.replace("\n", "; ") or "not here"),
    ]
    return Table("What finds what", ("asked", "answer"), tuple(rows))


def _row(place: Place, dtype: torch.dtype, size: int) -> tuple[str, str, str]:
    a = torch.randn(size, size, device=place.device).to(dtype)
    b = torch.randn(size, size, device=place.device).to(dtype)
    seconds = _seconds(place, a, b)
    flops = 2 * size**3 / seconds
    peak = None if place.is_small else peak_flops(torch.cuda.get_device_name(0))
    return str(dtype).removeprefix("torch."), number(flops / 1e12), share(flops / peak if peak else None)


def _seconds(place: Place, a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the seconds of one product, from many in a row."""
    a @ b
    _wait(place)
    started = time.perf_counter()
    for _ in range(_ROUNDS):
        a @ b
    _wait(place)
    return (time.perf_counter() - started) / _ROUNDS


def _wait(place: Place) -> None:
    if not place.is_small:
        torch.cuda.synchronize()
