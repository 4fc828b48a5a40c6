"""Built tensor by tensor where it will be trained: every bit as before.

Two ranks of real DeepSpeed; under ZeRO 3 each keeps its part.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1hpc.config.schema.run import ModelConfig, Precision, RunConfig, TrainConfig
from r1hpc.config.schema.sections import DeepspeedConfig
from r1hpc.train.model.model import build_model, cast_parameters
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import build_engine, deepspeed_config
from r1hpc.train.rollout.policy import DTYPES, build_policy, placement
from tests.train.two_ranks import gathered, run_on_two_ranks

WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"num_key_value_heads": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 1}
LLAMA = {"model_type": "llama", **WIDE, "tie_word_embeddings": False}
QWEN2 = {"model_type": "qwen2", **WIDE, "tie_word_embeddings": True}
MIXTRAL = {"model_type": "mixtral", **WIDE, "num_local_experts": 4}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 32, "vocab_size": 40}
GPT2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (LLAMA, {}),
    "qwen2, tied": (QWEN2, {}),
    "mixtral": (MIXTRAL, {}),
    "gpt2": (GPT2, {}),
    "gates": (LLAMA, {"attn_implementation": "gate_norm"}),
    "adapters": (LLAMA, {"lora_rank": 2}),
    "adapters on gpt2": (GPT2, {"lora_rank": 2}),
}
SMALL = {"stage3_param_persistence_threshold": 40, "reduce_bucket_size": 10_000}
"""So that ZeRO 3 really parts the parameters of a tiny model, and no gigabyte is set aside for it."""
IDS = torch.tensor([[1, 5, 2, 7, 3, 3, 9], [4, 4, 8, 1, 0, 6, 2]])


def settings(stage: int, precision: Precision, model: ModelConfig) -> RunConfig:
    return RunConfig(
        stage="sft",
        model=model,
        train=TrainConfig(precision=precision, micro_batch_size=2, lr=1e-2),
        deepspeed=DeepspeedConfig(zero_stage=stage, extra={"zero_optimization": SMALL}),
    )


def trained(network: Any, config: RunConfig, group: Group) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights in the engine before and after one step."""
    made = deepspeed_config(config, world_size=group.world_size, on_gpu=False, load_universal=False)
    engine = build_engine(network, made)
    before = gathered(engine.module)
    logits = engine(input_ids=IDS).logits.float()
    engine.backward(logits.logsumexp(-1).mean() - logits[..., 3].mean())
    engine.step()
    return before, gathered(engine.module)


def compare_ways(group: Group, folder: Path) -> None:
    """Each case from random weights and from a folder, whole and divided, built both ways."""
    differing = []
    for name, (hf_config, more) in CASES.items():
        weights = folder / name
        if group.rank == 0:
            build_model(ModelConfig(), hf_config, seed=5).save_pretrained(weights)
        group.barrier()
        for path in (None, str(weights)):
            for stage, precision in ((1, "bf16"), (3, "bf16"), (3, "fp32")):
                config = settings(stage, Precision(precision), ModelConfig(path=path, **more))
                plain = build_policy(config, hf_config)
                cast_parameters(plain, DTYPES[config.train.precision])
                drawn = torch.get_rng_state()
                placed = build_policy(config, hf_config, placement(config, group, divided=True))
                same = torch.equal(drawn, torch.get_rng_state()) and same_bits(plain, gathered(placed))
                buffers = dict(placed.named_buffers())
                same &= all(torch.equal(buffers[key], value) for key, value in plain.named_buffers())
                divided = any(hasattr(p, "ds_id") for p in placed.parameters())
                if not same or divided != (stage == 3):
                    differing.append((name, path, stage, precision))
    assert not differing, differing


def same_bits(network: Any, weights: dict[str, Tensor]) -> bool:
    theirs = dict(network.named_parameters())
    return theirs.keys() == weights.keys() and all(
        weight.dtype == theirs[key].dtype and torch.equal(weight, theirs[key])
        for key, weight in weights.items()
    )


def test_every_bit_is_as_before(tmp_path: Path) -> None:
    run_on_two_ranks(compare_ways, tmp_path, timeout_s=280)


def train_both_ways(group: Group, folder: Path) -> None:
    """Adapters under ZeRO 2, all weights under ZeRO 3: a step of DeepSpeed on both."""
    if group.rank == 0:
        build_model(ModelConfig(), QWEN2, seed=5).save_pretrained(folder / "weights")
    group.barrier()
    for stage, rank in ((2, 2), (3, 0), (3, 2)):
        model = ModelConfig(path=str(folder / "weights"), lora_rank=rank)
        config = settings(stage, Precision.bf16, model)
        one = trained(build_policy(config, QWEN2), config, group)
        place = placement(config, group, divided=True)
        other = trained(build_policy(config, QWEN2, place), config, group)
        for ours, theirs in zip(one, other, strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), (stage, rank)
        assert not all(torch.equal(one[0][key], one[1][key]) for key in one[0])


def test_trained_it_is_the_same_model(tmp_path: Path) -> None:
    run_on_two_ranks(train_both_ways, tmp_path, timeout_s=280)
