"""Gradient compression that a run cannot have is refused in words."""

from dataclasses import replace

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.memory.run import copied_bytes, exchange_bytes, memory_of_run, saved_bytes
from r1hpc.plan.model.shape import model_shape
from r1hpc.plan.topology.batch import Topology
from r1hpc.plan.topology.checks import check_layout

# Qwen2.5-0.5B by its config.json.
QWEN = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
QWEN |= {"tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPE = model_shape(QWEN)
PLUS_PLUS = "deepspeed.extra={zero_optimization: {%s}}"
ON_CPUS = ("deepspeed.zero_stage=0", "resources.gpus_per_node=0")


def compressed(*words: str) -> RunConfig:
    return load.load(None, [*ON_CPUS, "train.gradient_compression=int8", *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("deepspeed.zero_stage=1",),
            "is for deepspeed.zero_stage=0, and this run has 1, .*: take zero_stage=0",
        ),
        (("deepspeed.zero_stage=3",), "for ZeRO 3 see"),
        (("stage=evaluate",), "no use in stage evaluate"),
        (("stage=sft", "model.lora_rank=8"), "adapters .*: take train.gradient_compression=none"),
        (("train.precision=fp16", "resources.gpus_per_node=1"), "take bf16 or fp32"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_layout(compressed(*words))


@pytest.mark.parametrize(
    ("zero", "near", "said"),
    [
        (2, 2, "zero_hpz_partition_size is of deepspeed.zero_stage=3, and this run has 2"),
        (3, 3, "3 does not divide the run's 4 ranks"),
    ],
)
def test_a_second_copy_where_it_cannot_be(zero: int, near: int, said: str) -> None:
    words = (f"deepspeed.zero_stage={zero}", PLUS_PLUS % f"zero_hpz_partition_size: {near}")
    with pytest.raises(UsageError, match=said):
        check_layout(load.load(None, [*ON_CPUS, "resources.ranks_per_node=4", *words]))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("train.gradient_compression=powersgd", "train.precision=fp32"),
        ("stage=rl", "train.gradient_compression=int8"),
        ("deepspeed.zero_stage=3", PLUS_PLUS % "zero_hpz_partition_size: 2"),
        (
            *("deepspeed.zero_stage=3", "resources.gpus_per_node=8"),
            PLUS_PLUS
            % "zero_hpz_partition_size: 8, zero_quantized_weights: true, zero_quantized_gradients: true",
        ),
    ],
)
def test_what_goes_together(words: tuple[str, ...]) -> None:
    check_layout(load.load(None, [*ON_CPUS, "resources.ranks_per_node=4", *words]))


def test_errors_are_in_the_plan_of_memory_and_checkpoints() -> None:
    """fp32, as many as parameters, on each rank."""
    topology, errors = Topology(2, 4, 4), 4 * SHAPE.num_parameters
    config = compressed("resources.gpus_per_node=4")
    plain = replace(config, train=replace(config.train, gradient_compression="none"))
    held, without = (memory_of_run(c, SHAPE, topology, 512) for c in (config, plain))
    work = exchange_bytes(config, SHAPE)
    assert work == 6 * max(1 << 25, SHAPE.vocab_size * SHAPE.hidden_size)
    assert (held.total_gib - without.total_gib) * 2**30 == pytest.approx(errors + work)
    assert (held.host_gib - without.host_gib) * 2**30 == pytest.approx(4 * errors)
    assert saved_bytes(config, SHAPE, 8) - saved_bytes(plain, SHAPE, 8) == 8 * errors
    (rank, node), (plain_rank, plain_node) = (copied_bytes(c, SHAPE, topology) for c in (config, plain))
    assert (rank - plain_rank, node - plain_node) == (errors, 4 * errors)
