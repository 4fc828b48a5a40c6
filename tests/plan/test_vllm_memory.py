"""What vLLM starts in: its share of the card against weights, working memory and the cache of a sequence."""

from dataclasses import replace
from typing import Any

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config import load
from r1hpc.config.schema.cluster import ClusterConfig
from r1hpc.config.schema.rl import EvaluateConfig, GenerateConfig
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.plan.memory.run import memory_of_run, misfits
from r1hpc.plan.memory.vllm import VllmMemory, num_sequences, vllm_batch, vllm_memory
from r1hpc.plan.model.shape import model_shape
from r1hpc.plan.run import make_plan
from r1hpc.plan.topology.batch import Topology
from tests.plan.test_run_memory import NODES_OF_A100, QWEN_7B, QWEN_32B, grpo

QWEN_14B = {**QWEN_32B, "intermediate_size": 13824, "num_hidden_layers": 48}
SHAPE = model_shape(QWEN_7B)
WEIGHTS_7B = SHAPE.num_parameters * 2 / 2**30
SEQUENCE_7B = 0.08203125
"""GiB of 1,536 tokens by vLLM 0.32: FullAttentionSpec(16, 4, 128, bfloat16).page_size_bytes x 96 x 28."""


def asked(options: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    made = grpo(**changes)
    return replace(made, rollout=replace(made.rollout, engine="vllm", vllm_options=options or {}))


def found(config: RunConfig, card_gib: float = 80, topology: Topology = NODES_OF_A100) -> VllmMemory:
    memory = vllm_memory(config, SHAPE, topology, card_gib)
    assert memory is not None
    return memory


def said(config: RunConfig, model: dict[str, Any], card_gib: float) -> list[str]:
    memory = memory_of_run(config, model_shape(model), NODES_OF_A100, 1536, card_gib)
    return list(misfits(memory, gpu_gib=card_gib, host_gib=None))


@pytest.mark.parametrize(("model", "card_gib", "share"), [(QWEN_7B, 40, 12.0), (QWEN_14B, 80, 24.0)])
def test_a_share_that_does_not_hold_the_weights_and_what_vllm_works_in(
    model: dict[str, Any], card_gib: float, share: float
) -> None:
    """vLLM would say "No available memory for the cache blocks", after the cold start."""
    (sentence,) = said(asked(), model, card_gib)
    assert sentence.startswith("does not fit: vLLM starts in no less than")
    assert f"has {share:.1f} by rollout.vllm_options (gpu_memory_utilization" in sentence
    assert "each GPU would hold" not in sentence, "there is room on the card"
    weights = model_shape(model).num_parameters * 2 / 2**30
    enough, too_little = (weights + more for more in (3.0, 0.9))
    assert said(asked({"gpu_memory_utilization": enough / card_gib}), model, card_gib) == []
    assert said(asked({"gpu_memory_utilization": too_little / card_gib}), model, card_gib)


def test_the_share_that_does_is_named() -> None:
    words = ["rollout.engine=vllm", "cluster.gpu_type=a100-40gb", "deepspeed.zero_stage=3"]
    words += [f"model.config={QWEN_7B}".replace("'", ""), "train.precision=bf16"]

    def plan_of(*more: str) -> Any:
        config = load.load("rl_smoke", [*words, *more])
        return make_plan(config, gpus_per_node=8, num_nodes=4).memory

    memory = plan_of()
    (sentence,) = misfits(memory, gpu_gib=40, host_gib=None)
    way = sentence.partition("; it would fit with ")[2]
    setting, _, value = way.partition("=")
    assert setting == "rollout.vllm_options.gpu_memory_utilization"
    assert memory.vllm_least_gib <= 40 * float(value) < 40 * 0.5
    assert list(misfits(plan_of(way), gpu_gib=40, host_gib=None)) == []
    less = f"{setting}={memory.vllm_least_gib / 40 - 0.01:.2f}"
    assert list(misfits(plan_of(less), gpu_gib=40, host_gib=None)), "and a little less does not"


def test_the_least_by_hand() -> None:
    a100 = found(asked(evaluate=EvaluateConfig(num_samples=1)))
    assert a100.fixed_gib == pytest.approx(WEIGHTS_7B + 8192 * SHAPE.saved_values * 2 / 2**30 + 0.5)
    assert a100.least_gib - a100.fixed_gib == pytest.approx(SEQUENCE_7B)
    assert a100.wanted_gib - a100.fixed_gib == pytest.approx(16 * SEQUENCE_7B), "one prompt's completions"
    small = found(asked({"max_num_batched_tokens": 1024, "max_num_seqs": 8}))
    assert small.fixed_gib < a100.fixed_gib - 1
    # On an H100 vLLM takes twice the tokens and four times the sequences at once.
    h100 = found(asked(cluster=ClusterConfig(gpu_type="h100")))
    assert h100.fixed_gib - WEIGHTS_7B - 0.5 == pytest.approx(2 * (a100.fixed_gib - WEIGHTS_7B - 0.5))


def test_the_cache_that_is_wanted_is_for_all_that_a_rank_decodes_together() -> None:
    """Evaluations of stage rl too; of a part no more items than there are."""

    def wanted(config: RunConfig) -> float:
        memory = found(config)
        return (memory.wanted_gib - memory.fixed_gib) / SEQUENCE_7B

    assert wanted(asked()) == pytest.approx(8 * 8), "of an evaluation; a rollout has 16"
    few = asked(
        evaluate=EvaluateConfig(num_items=2, num_samples=8), generate=GenerateConfig(items_per_part=256)
    )
    alone = replace(few, stage="evaluate", rollout=replace(few.rollout, prompts_per_batch=0))
    assert wanted(alone) == pytest.approx(2 * 8)


_LONG = 131_072
_FAST, _WHOLE = {"performance_mode": "throughput"}, {"enable_chunked_prefill": False}


BATCHES: list[tuple[dict[str, Any], str, int, tuple[int, int]]] = [
    ({}, "a100", 1536, (8192, 256)),
    ({}, "h100", 1536, (16384, 1024)),
    (_FAST, "a100", 1536, (16384, 512)),
    (_FAST, "h100", 1536, (32768, 2048)),
    (_FAST | {"max_num_seqs": 8}, "h100", 1536, (8 * 1536, 8)),
    (_FAST | {"max_num_batched_tokens": 1000}, "h100", 1536, (1000, 1000)),
    (_WHOLE, "a100", 1536, (8192, 256)),
    (_WHOLE, "a100", _LONG, (_LONG, 256)),
    (_WHOLE | {"max_num_seqs": 300}, "h100", _LONG, (_LONG, 300)),
    ({"enable_chunked_prefill": True}, "a100", _LONG, (8192, 256)),
    ({"max_num_seqs": 4}, "a100", 1536, (4 * 1536, 4)),
    ({"max_num_seqs": 4, "max_num_batched_tokens": 8000}, "a100", 1536, (8000, 4)),
    ({"max_num_batched_tokens": 100}, "a100", 1536, (100, 100)),
    ({}, "h100", 8, (1024 * 8, 1024)),
]
"""rollout.vllm_options, card, longest sequence -> tokens and sequences at once."""
CACHES = [
    ("auto", "bf16", 1.0),
    ("fp8", "bf16", 0.5),
    ("fp8_e5m2", "bf16", 0.5),
    ("fp8_e4m3", "fp32", 0.25),
    ("bfloat16", "fp32", 0.5),
    ("int8_per_token_head", "bf16", 0.5 + 4 / 256),
    ("fp8_per_token_head", "bf16", 0.5 + 4 / 256),
]
"""kv_cache_dtype, train.precision -> part of the bytes that a key of 128 values takes in the weights'."""


@pytest.mark.parametrize(("options", "card", "longest", "batch"), BATCHES)
def test_what_vllm_takes_at_once(
    options: dict[str, Any], card: str, longest: int, batch: tuple[int, int]
) -> None:
    """As vLLM settles it itself: tests/train/test_vllm_defaults.py."""
    config = asked(options, cluster=ClusterConfig(gpu_type=card))
    rollout = replace(config.rollout, max_prompt_length=longest // 2, max_completion_length=longest // 2)
    assert vllm_batch(replace(config, rollout=rollout), 80) == batch


@pytest.mark.parametrize(("dtype", "precision", "share"), CACHES)
def test_a_cache_in_fewer_bits(dtype: str, precision: str, share: float) -> None:
    """As vLLM counts it itself: tests/train/test_vllm_defaults.py."""
    train = replace(grpo().train, precision=Precision(precision))
    plain, small = (found(asked(options, train=train)) for options in ({}, {"kv_cache_dtype": dtype}))
    caches = [memory.least_gib - memory.fixed_gib for memory in (plain, small)]
    assert caches[1] == pytest.approx(share * caches[0])
    assert small.fixed_gib == plain.fixed_gib


def test_without_cuda_graphs_it_starts_in_less() -> None:
    eager, plain = found(asked({"enforce_eager": True})), found(asked({"enforce_eager": False}))
    assert plain == found(asked())
    assert plain.least_gib - eager.least_gib == pytest.approx(0.4)


def test_sequences_so_long_that_none_fits() -> None:
    long = replace(asked().rollout, max_completion_length=131_072 - 512)
    memory = found(replace(asked(), rollout=long), 40)
    assert memory.least_gib - memory.fixed_gib == pytest.approx(SEQUENCE_7B * 131_072 / 1536)
    assert memory.given_gib < memory.least_gib


def test_a_tied_head_is_a_tensor_of_its_own_in_vllm() -> None:
    tied = {**QWEN_7B, "tie_word_embeddings": True}
    memory = vllm_memory(asked(), model_shape(tied), NODES_OF_A100, 80)
    assert memory is not None
    assert memory.fixed_gib == pytest.approx(found(asked()).fixed_gib)


def test_a_cache_that_is_given_goes_before_the_share() -> None:
    enough, short = (found(asked({"kv_cache_memory_bytes": given})) for given in (2**30, 1000))
    assert enough.given_gib == pytest.approx(enough.fixed_gib + 1)
    assert enough.taken_gib == pytest.approx(0.3 * 80), "which is to be free when it starts, all the same"
    assert short.given_gib < short.least_gib
    assert said(asked({"kv_cache_memory_bytes": 2**30}), QWEN_7B, 80) == []
    assert said(asked({"kv_cache_memory_bytes": 1000}), QWEN_7B, 80)


def test_vllm_that_does_not_sleep_is_there_during_the_updates() -> None:
    plans = [
        memory_of_run(asked(options), SHAPE, NODES_OF_A100, 1536)
        for options in ({}, {"enable_sleep_mode": False})
    ]
    training = plans[0].activations_gib + plans[0].logits_gib
    assert plans[1].total_gib - plans[0].total_gib == pytest.approx(training)


def test_on_a_cpu_it_has_no_share_of_a_card() -> None:
    ranks = Topology(1, 2, 0)
    memory = found(asked(), topology=ranks)
    assert memory.taken_gib == pytest.approx(WEIGHTS_7B + 1)
    held = memory_of_run(asked(), SHAPE, ranks, 1536)
    assert held.sampler_gib == memory.taken_gib


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 30}, r"gpu_memory_utilization is 30: .* above 0 and at most 1"),
        ({"gpu_memory_utilization": "half"}, r"gpu_memory_utilization is 'half'"),
        ({"kv_cache_memory_bytes": "2**30"}, r"is '2\*\*30': it must be a whole number.* 1073741824"),
        ({"max_num_seqs": 0}, r"max_num_seqs is 0: it must be a whole number"),
    ],
)
def test_options_that_are_no_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        found(asked(options))


def test_it_takes_no_more_sequences_at_once_than_a_rank_decodes() -> None:
    """What it works in grows with them, whether they come or not; beyond its own number it is left to it."""
    few, many = asked(), asked()
    few = replace(few, rollout=replace(few.rollout, num_prompts=32, prompts_per_batch=0))
    evaluate = EvaluateConfig(num_items=32, num_samples=1)
    few = replace(few, evaluate=evaluate)
    assert num_sequences(few, num_ranks=8) == 4 * 16
    tight = replace(few.rollout, vllm_options={"max_num_batched_tokens": 48})
    assert num_sequences(replace(few, rollout=tight), num_ranks=8) == 48, "vLLM refuses more"
    many = replace(many, rollout=replace(many.rollout, num_prompts=512, prompts_per_batch=0))
    assert num_sequences(many, num_ranks=8) is None
    on_h100 = asked(cluster=ClusterConfig(gpu_type="h100"))
    assert [vllm_batch(on_h100, 80, rows)[1] for rows in (64, None)] == [64, 1024]
    assert vllm_batch(asked({"max_num_seqs": 300}), 80, 64)[1] == 300
