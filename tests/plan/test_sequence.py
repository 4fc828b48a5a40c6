"""train.sequence_parallel: the batch counts groups of ranks, memory parts of sequences; what is refused."""

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config.load import load
from r1hpc.plan.run import RunPlan, make_plan

_TWO = "train.sequence_parallel=2"


def plan(*words: str, job: str = "smoke", ranks: int = 4, gpus: int = 0) -> RunPlan:
    config = load(job, [f"resources.ranks_per_node={ranks}", *words])
    return make_plan(config, gpus_per_node=gpus, vocab_size=512)


def test_the_batch_is_spread_over_groups() -> None:
    assert plan().batch.gradient_accumulation_steps == 3  # 24 = 4 ranks x 2 x 3
    assert plan(_TWO).batch.gradient_accumulation_steps == 6
    assert plan("train.sequence_parallel=2", "resources.nodes=3").batch.gradient_accumulation_steps == 2
    assert plan(_TWO).tokens_per_step == plan().tokens_per_step
    assert plan(_TWO).flops_per_token == plan().flops_per_token


def test_a_batch_that_does_not_come_out_names_groups() -> None:
    with pytest.raises(ConfigError) as refused:
        plan(_TWO, "train.micro_batch_size=5")
    assert "4 ranks / train.sequence_parallel 2 x train.micro_batch_size 5" in str(refused.value)
    assert "(ranks per node: 4, 2 to a sequence) are: 1 node, micro batch 6" in str(refused.value)


def test_a_rank_holds_activations_and_logits_of_its_part() -> None:
    words = ("data.seq_len=1024", "train.logits_chunk_tokens=0")
    whole, half = plan(*words, gpus=4).memory, plan(*words, _TWO, gpus=4).memory
    assert whole is not None
    assert half is not None
    assert half.activations_gib == pytest.approx(whole.activations_gib / 2)
    assert half.logits_gib == pytest.approx(whole.logits_gib / 2)
    assert half.optimizer_gib == whole.optimizer_gib, "ZeRO divides over all ranks"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train.sequence_parallel=8",), "must divide the 4 ranks of a node.* take one of 1, 2, 4"),
        (("train.sequence_parallel=4",), "4 attention heads and 2 key-value heads: take one of 1, 2"),
        ((_TWO, "data.seq_len=127"), r"must divide data\.seq_len=127: take data\.seq_len=128"),
        ((_TWO, "stage=sft", "data.packing=true"), r"set data\.packing=false, or train\.sequence_parallel=1"),
        ((_TWO, "model.attn_implementation=eager"), "=eager: take one of sdpa"),
        ((_TWO, "model.attn_implementation=flash_attention_2"), "=flash_attention_2: take one of sdpa"),
        ((_TWO, "model.config.rope_scaling={rope_type: dynamic, factor: 2}"), r"frequencies \(dynamic\)"),
        ((_TWO, "model.config.rope_parameters={full: {rope_type: longrope}}"), r"frequencies \(longrope\)"),
        ((_TWO, "model.config.rope_scaling={type: su}"), r"frequencies \(su\)"),
        ((_TWO, "stage=evaluate"), "pretraining and fine-tuning only"),
    ],
)
def test_what_ranks_cannot_share_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*words)


def test_rl_samples_whole_sequences() -> None:
    with pytest.raises(ConfigError, match=r"pretraining and fine-tuning only.* stage is rl"):
        plan(_TWO, job="rl_smoke")


def test_deepspeed_is_not_told() -> None:
    config = load("smoke", ["deepspeed.extra.sequence_parallel_size=2"])
    with pytest.raises(ConfigError, match=r"sequence_parallel_size is set by train\.sequence_parallel"):
        config.deepspeed.check_new()
