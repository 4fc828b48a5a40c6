"""Models in integers, made on the device: whether they are those of the CPU, how far logits go, the time."""

import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.place import Place
from benchmarks.gpu.shapes import QWEN_05B, TINY, config_of
from benchmarks.gpu.table import Table, number, seconds
from r1hpc.train.quantize.quantize import load_folder, quantize

_VOCAB = 4096


def run(place: Place) -> list[Table]:
    cases = [("int8", False), ("int8", True), ("w4a16", False)]
    with tempfile.TemporaryDirectory(dir=place.folder) as folder:
        source = _source(Path(folder, "original"), TINY if place.is_small else QWEN_05B)
        rows = tuple(_row(place, source, Path(folder), *case) for case in cases)
    header = (
        "scheme",
        "calibrated",
        "made in",
        "on the CPU",
        "integers that are the same",
        "error of logits",
    )
    notes = (
        "Random weights in bf16, calibrated on 16 texts of 256 tokens. Error: of the difference to the "
        "original's logits, as a share of their norm, in fp32.",
    )
    return [Table("Integers", header, rows, notes)]


def _source(folder: Path, shape: dict[str, object]) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**config_of(shape, _VOCAB))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _row(place: Place, source: Path, folder: Path, scheme: str, calibrated: bool) -> tuple[str, ...]:
    texts = _texts().tolist() if calibrated else None
    made: list[Path] = []
    taken: list[float] = []
    for device in (place.device, "cpu"):
        out = folder / f"{scheme}-{calibrated}-{len(made)}"
        out.mkdir()
        started = time.perf_counter()
        quantize(source, out, scheme, texts, torch.device(device))
        taken.append(time.perf_counter() - started)
        made.append(out)
    same = _same(*(load_file(out / "model.safetensors") for out in made))
    error = _error(place, source, made[0])
    said = "yes" if calibrated else "no"
    return scheme, said, seconds(taken[0]), seconds(taken[1]), f"{same:.2%}", number(error)


def _texts() -> torch.Tensor:
    return torch.randint(0, _VOCAB, (16, 256), generator=torch.Generator().manual_seed(1))


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The share of the bytes of integers."""
    names = [name for name, tensor in one.items() if tensor.dtype in (torch.int8, torch.int32)]
    equal = [
        one[name].view(torch.uint8).eq(other[name].view(torch.uint8)).double().flatten() for name in names
    ]
    return float(torch.cat(equal).mean())


@torch.no_grad()
def _error(place: Place, source: Path, made: Path) -> float:
    device = torch.device(place.device)
    ids = _texts()[:1].to(device)
    before, after = (load_folder(path, device)(input_ids=ids).logits.cpu() for path in (source, made))
    return float((after - before).norm() / before.norm())
