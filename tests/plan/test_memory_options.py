"""Which configurations fit, against published runs that did, and what is said where nothing does."""

import statistics
from dataclasses import replace
from typing import Any

import pytest

from r1hpc.plan.hours.memory_options import MemoryOptions, guessed_shape, memory_options, option_of
from r1hpc.plan.hours.workload import Workload
from r1hpc.plan.memory.run import usable_gib
from r1hpc.plan.model.shape import ModelShape, model_shape
from r1hpc.plan.topology.gpus import find_gpu
from research.estimator.published_rows import Published, read_published, read_table

_MPT = {
    "125m": (12, 768),
    "350m": (24, 1024),
    "760m": (24, 1536),
    "1b": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
    "13b": (40, 5120),
    "30b": (48, 7168),
    "70b": (80, 8192),
}
"""Layers and hidden size (mosaicml/llm-foundry, scripts/train/yamls/pretrain)."""


def _options(params: float, gpu: str, num_gpus: int, **known: Any) -> MemoryOptions:
    work = Workload.of_counts(params=params, tokens=1e10, gpu=find_gpu(gpu), num_gpus=num_gpus, **known)
    return memory_options(work)


def test_everything_named_fits_and_the_fastest_is_first() -> None:
    options = _options(7e9, "a100-80gb", 8)
    assert options.best is options.fits[0]
    assert all(option.total_gib <= options.usable_gib for option in options.fits)
    speeds = [round(option.expected_mfu, 4) for option in options.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert options.least_gpus is None
    kinds = [(o.zero_stage, o.recompute, o.offload) for o in options.fits]
    assert len(set(kinds)) == len(kinds)


def test_a_layout_is_not_in_it_and_stops_nothing() -> None:
    for gpus in (16, 208):
        known: dict[str, Any] = {"params": 7e9, "tokens": 1e10, "gpu": find_gpu("a100"), "num_gpus": gpus}
        split = Workload.of_counts(**known, tensor_parallel=8, pipeline_parallel=2)
        assert memory_options(split) == memory_options(Workload.of_counts(**known))


def test_plain_data_parallelism_wins_where_it_fits() -> None:
    assert _options(1e8, "a100-80gb", 8).best.zero_stage == 0  # type: ignore[union-attr]


def test_a_7b_on_one_16_gb_card() -> None:
    options = _options(7e9, "v100-16gb", 1, precision="fp16")
    assert not options.fits
    assert options.best is None
    assert options.smallest.total_gib > options.usable_gib
    assert options.least_gpus == 16
    assert _options(7e9, "v100-16gb", 16, precision="fp16").fits


def test_a_sequence_that_no_number_of_cards_holds() -> None:
    options = _options(7e9, "a100-40gb", 8, seq_len=1 << 20)
    assert not options.fits
    assert options.least_gpus is None


def test_micro_batches_stay_inside_the_global_batch() -> None:
    options = _options(1e9, "a100-80gb", 8, tokens_per_step=8 * 2 * 2048.0)
    assert max(option.micro_batch_size for option in options.fits) == 2


def test_offload_moves_the_optimizer() -> None:
    known: dict[str, Any] = {"num_gpus": 8, "zero_stage": 3, "micro_batch_size": 1, "recompute": "full"}
    work = Workload.of_counts(params=7e9, tokens=1e10, gpu=find_gpu("a100"), **known)
    shape = guessed_shape(work)
    plain, offloaded = (option_of(shape, replace(work, offload=offload)).memory for offload in (False, True))
    assert plain.states_gib - offloaded.states_gib == pytest.approx(14 * 7e9 / 8 / 2**30)
    assert offloaded.host_gib == pytest.approx(18 * 7e9 / 8 / 2**30), "fp32 gradients lie there too"


def _mpt_shape(row: Published, model: str) -> ModelShape:
    layers, hidden = _MPT[model.removeprefix("MPT-")]
    return model_shape(
        {
            "model_type": "gpt_neox",
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "vocab_size": 50368,
            "max_position_embeddings": row.workload.seq_len,
        }
    )


def test_against_published_configurations_that_ran() -> None:
    """155 rows of llm-foundry, micro batches raised until the card was full. Planned over the card: median
    0.97, from 0.34 to 1.33; above 1 mostly by our fp32 logits, which llm-foundry keeps in 16 bits."""
    models = {row["id"]: row["model"] for row in read_table("published_runs.csv")}
    parts = []
    for row in read_published():
        if row.team != "mosaic" or row.is_run:
            continue
        work = row.workload
        assert work.num_gpus is not None
        assert work.micro_batch_size is not None
        option = option_of(_mpt_shape(row, models[row.id]), work, logits_chunk_tokens=0)
        parts.append(option.total_gib / work.gpu.memory_gib)
    assert len(parts) == 155
    assert statistics.median(parts) == pytest.approx(0.97, abs=0.05)
    assert max(parts) < 1.35


def test_published_runs_that_need_sharding_are_refused_without() -> None:
    """MPT-30B at 8192 tokens ran on 8 H100 with ZeRO-3, micro batch 1 and recomputation (mosaic-021)."""
    work = Workload.of_counts(params=30e9, tokens=1e9, gpu=find_gpu("h100"), num_gpus=8, seq_len=8192)
    options = memory_options(work)
    assert {option.zero_stage for option in options.fits if not option.offload} == {3}
    assert usable_gib(find_gpu("h100").memory_gib) < 80
