"""The reference, or a teacher, whole, divided over the ranks and in host memory: it says the same, less is
held."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from r1hpc.config.schema.rl import RlConfig
from r1hpc.config.schema.run import ModelConfig, Precision, RunConfig, TrainConfig
from r1hpc.config.schema.sections import DeepspeedConfig
from r1hpc.train.model.model import build_model
from r1hpc.train.model.output_head import OutputHead
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rollout.policy import Reference, build_reference
from tests.train.two_ranks import run_on_two_ranks

QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN2 |= {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 400, "tie_word_embeddings": True}
"""Wide enough that DeepSpeed parts its matrices: by default it keeps what has fewer than 100,000 values."""
IDS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(0))


def config_of(place: str, precision: Precision, zero_stage: int) -> RunConfig:
    return RunConfig(
        stage="rl",
        model=ModelConfig(config=QWEN2),
        train=TrainConfig(precision=precision, micro_batch_size=3),
        rl=RlConfig(kl_coef=0.1, reference=place),
        deepspeed=DeepspeedConfig(zero_stage=zero_stage),
    )


def held_by(reference: Reference) -> int:
    parameters: list[Any] = list(reference.model.parameters())
    found: int = sum(p.numel() for p in parameters)
    found += sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_id"))
    return found


@torch.no_grad()
def ask(group: Group, place: str, precision: Precision, zero_stage: int = 3) -> tuple[Tensor, int]:
    """Log-probabilities by the reference, and the values it holds on this rank between two questions."""
    job: Any = SimpleNamespace(config=config_of(place, precision, zero_stage), group=group)
    reference = build_reference(job, QWEN2)
    assert reference is not None
    held = held_by(reference)
    head = OutputHead(reference.model, 4)
    run = lambda: reference.network(input_ids=IDS[:, :-1]).logits  # noqa: E731
    with reference.context():
        logprobs = [head.scores(run, IDS[:, 1:]).logprobs for _ in range(2)]
    assert torch.equal(*logprobs)
    return logprobs[0], held


@torch.no_grad()
def ask_teacher(group: Group, place: str, folder: Path) -> tuple[Tensor, int]:
    """The teacher's logits, and the values it holds on this rank between two questions."""
    rl = RlConfig(algorithm="distill", teacher=str(folder), reference=place)
    config = replace(config_of(place, Precision.bf16, 3), rl=rl)
    job: Any = SimpleNamespace(config=config, group=group)
    reference = build_reference(job, {"model_type": "gpt2"})  # what the student is does not matter
    assert reference is not None
    head = OutputHead(reference.model, 4)
    run = lambda: reference.network(input_ids=IDS[:, :-1]).logits  # noqa: E731
    with reference.context():
        logits = [head.logits(run, IDS[:, 1:]) for _ in range(2)]
    assert torch.equal(*logits)
    held = held_by(reference)
    return logits[0], held


def compare_teachers(group: Group, folder: Path) -> None:
    teacher = folder / "teacher"
    if group.rank == 0:
        build_model(ModelConfig(), QWEN2, seed=5).save_pretrained(teacher)
    group.barrier()
    whole, all_values = ask_teacher(group, "whole", teacher)
    assert whole.shape == (IDS[:, 1:].numel(), QWEN2["vocab_size"])
    for place in ("divided", "host", "auto"):
        found, held = ask_teacher(group, place, teacher)
        assert torch.equal(found, whole), place
        assert held < 0.7 * all_values, (place, held, all_values)


def compare_places(group: Group, folder: Path) -> None:
    for precision in (Precision.fp32, Precision.bf16):
        whole, all_values = ask(group, "whole", precision)
        for place in ("divided", "host"):
            found, held = ask(group, place, precision)
            assert torch.equal(found, whole), (place, precision, (found - whole).abs().max())
            assert held < 0.7 * all_values, (place, held, all_values)
    found, _ = ask(group, "auto", Precision.bf16)
    assert torch.equal(found, whole)
    found, held = ask(group, "auto", Precision.bf16, zero_stage=1)
    assert torch.equal(found, whole)
    assert held == all_values
    compare_teachers(group, folder)


def test_wherever_it_lies_it_says_the_same(tmp_path: Path) -> None:
    run_on_two_ranks(compare_places, tmp_path, timeout_s=280)
