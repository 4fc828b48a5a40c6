"""Milliseconds a token of the built-in sampler, by rows decoded at once; and what its memory grows to."""

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.place import Place
from benchmarks.gpu.shapes import QWEN_05B, QWEN_15B, TINY, config_of
from benchmarks.gpu.table import Table, number
from r1hpc.base.units import GIB
from r1hpc.plan.topology.gpus import find_gpu
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.parallel.distributed import Group, attend_at_any_length, let_memory_grow
from r1hpc.train.rollout.torch_engine import Request, TorchSampler, streams

_PROMPT = 32


def run(place: Place) -> list[Table]:
    let_memory_grow()
    attend_at_any_length()
    sizes = {"tiny": TINY} if place.is_small else {"0.5B": QWEN_05B, "1.5B": QWEN_15B}
    rows = []
    for size, shape in sizes.items():
        network = _network(place, shape)
        rows += [_row(place, size, network, num) for num in ((2,) if place.is_small else (16, 64, 256))]
    header = ("model", "rows", "ms a token", "by bandwidth alone", "tokens/s", "reserved")
    notes = (
        f"bf16, temperature 1, prompts of {_PROMPT} tokens, no completion ends early; the second of two "
        "rollouts. By bandwidth alone: the weights read once, at the data sheet's rate.",
    )
    return [Table("Decoding", header, tuple(rows), notes)]


def _network(place: Place, shape: dict[str, object]) -> torch.nn.Module:
    config = AutoConfig.for_model(**config_of(shape, 64 if place.is_small else 151_936))
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return network.to(place.device)  # type: ignore[no-any-return]


def _row(place: Place, size: str, network: torch.nn.Module, num: int) -> tuple[str, ...]:
    length = 8 if place.is_small else 256
    if not place.is_small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(place, network, num, length) for _ in range(2)][1]
    ms = 1000 * seconds / length
    reserved = "-" if place.is_small else f"{torch.cuda.max_memory_reserved() / GIB:.1f} GiB"
    return (
        size,
        str(num),
        f"{ms:.1f}",
        _by_bandwidth(place, network),
        number(num * length / seconds),
        reserved,
    )


def _seconds(place: Place, network: torch.nn.Module, num: int, length: int) -> float:
    group = Group(0, 0, 1, torch.device(place.device))
    nothing_ends = SpecialIds(pad=0, eos=-1)
    sampler = TorchSampler(group, nothing_ends, zero_stage=0, replica=lambda: network)
    sampler.sync_weights(network)
    prompts = [[5] * _PROMPT] * num
    request = Request(prompts, streams(0, range(num), 1), 1, length, 1.0)
    started = time.perf_counter()
    assert sampler.sample(request, lambda: False) is not None
    return time.perf_counter() - started


def _by_bandwidth(place: Place, network: torch.nn.Module) -> str:
    if place.is_small:
        return "-"
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    return f"{1000 * size / (find_gpu(torch.cuda.get_device_name(0)).bandwidth_tb_s * 1e12):.1f}"
