"""Ranks that share their sequences compute what one rank does: losses, gradient norms and weights."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r1hpc.base.errors import ConfigError
from r1hpc.config import load
from r1hpc.data.read.loader import StepBatch
from r1hpc.data.read.order import RankShare
from r1hpc.data.read.sft_loader import Rows, TraceBatch
from r1hpc.tasks.text.tokenizer import TokenizerFiles
from r1hpc.train.loop.step import accumulate
from r1hpc.train.model.attention import OURS
from r1hpc.train.model.export import exported_config
from r1hpc.train.model.sequence import SequenceGroup, share_sequences
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import build_engine, deepspeed_config
from r1hpc.train.rollout.policy import build_policy, placement
from r1hpc.train.supervised.sft import FineTuning
from r1hpc.train.supervised.supervised import Pretraining
from tests.train.two_ranks import gathered, run_on_ranks

_VOCABULARY, _BATCH, _STEPS = 64, 4, 10
_LENGTH = 48
"""Tokens of a window."""
_ROW = 40
"""Of a row of fine-tuning: 39 inputs, which neither 2 nor 4 divides."""


@dataclass(frozen=True)
class Case:
    """A short training."""

    stage: str
    heads: tuple[int, int] = (8, 4)
    """Of the attention, and of its keys and values."""
    words: tuple[str, ...] = ()
    config: tuple[tuple[str, Any], ...] = ()
    """More of the model's."""

    @property
    def name(self) -> str:
        more = [*self.words, *(f"{key}={value}" for key, value in self.config)]
        return " ".join([self.stage, "x".join(map(str, self.heads)), *more])


PRETRAIN, SFT = Case("pretrain"), Case("sft")
PRETRAIN_9, SFT_9 = Case("pretrain", (9, 3)), Case("sft", (9, 3))
VARIANTS = (
    *(Case("sft", words=(f"model.attn_implementation={name}",)) for name in ("gate", "gate_norm")),
    Case("pretrain", words=("model.attn_implementation=sigmoid_bias",)),
    Case("pretrain", words=("model.activation_checkpointing=true", "train.logits_chunk_tokens=7")),
    Case("pretrain", config=(("model_type", "mistral"), ("sliding_window", 10))),
    Case(
        "pretrain", config=(("model_type", "gpt2"), ("attn_pdrop", 0), ("embd_pdrop", 0), ("resid_pdrop", 0))
    ),
)
FEW = (PRETRAIN, SFT, VARIANTS[0], VARIANTS[3])
EVERY = (PRETRAIN, SFT, PRETRAIN_9, SFT_9, *VARIANTS)


def trained(case: Case, group: Group, size: int, zero_stage: int) -> dict[str, Any]:
    """What ten steps of it came to: of each the loss and the gradient norm, and the weights."""
    words = [f"train.sequence_parallel={size}", f"deepspeed.zero_stage={zero_stage}", *case.words]
    # eps: without it Adam makes steps of lr out of what rounding left where a gradient vanishes.
    words += ["train.precision=fp32", "train.lr=1e-3", "train.eps=1e-6", "train.max_grad_norm=0.5"]
    words += ["train.micro_batch_size=2"]
    words += ["deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=40"]
    config = load.load(None, [*words, f"train.global_batch_size={_BATCH}", f"stage={case.stage}"])
    sequence = share_sequences(group, size)
    network = build_policy(config, shape(case), placement(config, group, divided=True))
    asked = deepspeed_config(config, world_size=group.world_size, on_gpu=False, load_universal=False)
    engine = build_engine(network, asked)
    attention = config.model.attn_implementation
    sequence.attend(engine, attention)
    exported = exported_config(engine.module).get("attn_implementation")
    assert exported == (attention if attention in OURS else None), "what its weights are right under"
    stage = stage_of(config, group, sequence)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(_STEPS):
        done = accumulate(engine, stage.losses(engine, batch_of(case.stage, step, sequence)))
        found["losses"].append(group.all_sum([done.loss])[0] / group.world_size)
        found["norms"].append(done.grad_norm)
    return found | {"weights": gathered(engine.module)}


def shape(case: Case) -> dict[str, Any]:
    heads, groups = case.heads
    sizes = {"vocab_size": _VOCABULARY, "hidden_size": 8 * heads, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": groups}
    return {"model_type": "llama", **sizes, **layers, **dict(case.config)}


def stage_of(config: Any, group: Group, sequence: SequenceGroup) -> Any:
    job: Any = SimpleNamespace(config=config, group=group)
    loader: Any = SimpleNamespace(plan=None)
    kind: Any = FineTuning if config.stage == "sft" else Pretraining
    return kind(job, loader, sequence, TokenizerFiles({}, (1,)))


def batch_of(stage: str, step: int, sequence: SequenceGroup) -> Any:
    """Of the same global batch on any number of ranks."""
    draws = np.random.default_rng(step)
    share = RankShare(_BATCH, 2, sequence.data_rank, sequence.data_world_size)
    ids = share.sample_ids(0)
    if stage == "pretrain":
        windows = draws.integers(_VOCABULARY, size=(_BATCH, _LENGTH + 1))
        return StepBatch(windows[ids], ids, 0)
    tokens = draws.integers(_VOCABULARY, size=(_BATCH, _ROW))
    ends = draws.integers(6, _ROW + 1, size=_BATCH)
    begins = ends - draws.integers(1, 6, size=_BATCH)  # so that most parts of a row have no loss
    mask = (np.arange(_ROW) >= begins[:, None]) & (np.arange(_ROW) < ends[:, None])
    num = int((ends - begins).sum())
    positions = np.tile(np.arange(_ROW), (share.micro_batch_size, 1))
    rows = tuple(Rows(tokens[part], mask[part], positions) for part in ids)
    return TraceBatch(rows, ids.ravel(), ids.ravel(), 0, num, _BATCH * _ROW, _BATCH * _ROW, _ROW)


def all_alone(group: Group, folder: Path) -> None:
    for case in EVERY:
        torch.save(trained(case, group, 1, 0), folder / f"{case.name}.pt")


def few_alone(group: Group, folder: Path) -> None:
    for case in FEW:
        torch.save(trained(case, group, 1, 0), folder / f"{case.name}.pt")


def differences(case: Case, group: Group, size: int, zero_stage: int, folder: Path) -> dict[str, Any]:
    """The largest of each kind, to what one rank alone computed; relative for losses and norms."""
    expected = torch.load(folder / f"{case.name}.pt")
    found = trained(case, group, size, zero_stage)
    assert min(expected["norms"]) > 0.5, "each step is clipped"
    return {
        "case": case.name,
        "dp x sp": f"{group.world_size // size} x {size}",
        "zero": zero_stage,
        **{
            kind: max(abs(a - b) / abs(b) for a, b in zip(found[kind], expected[kind], strict=True))
            for kind in ("losses", "norms")
        },
        "weights": max(float((found["weights"][k] - v).abs().max()) for k, v in expected["weights"].items()),
    }


def put_down(group: Group, folder: Path, cases: Iterable[tuple[Case, int, int]]) -> None:
    for case, size, stage in cases:
        line = json.dumps(differences(case, group, size, stage, folder))
        if group.rank == 0:
            with (folder / "differences.jsonl").open("a") as file:
                file.write(line + "\n")


def few_on_two(group: Group, folder: Path) -> None:
    put_down(group, folder, ((case, 2, stage) for stage, case in enumerate(FEW)))


def all_on_two(group: Group, folder: Path) -> None:
    cases = (PRETRAIN, SFT, *VARIANTS)
    put_down(group, folder, ((case, 2, stage) for case in cases for stage in range(4)))


def all_on_three(group: Group, folder: Path) -> None:
    put_down(group, folder, ((case, 3, stage) for case in (PRETRAIN_9, SFT_9) for stage in range(4)))


def all_on_four(group: Group, folder: Path) -> None:
    cases = [(case, size) for case in (PRETRAIN, SFT) for size in (2, 4)]
    put_down(group, folder, ((case, size, stage) for case, size in cases for stage in range(4)))


def check(folder: Path) -> None:
    for line in (folder / "differences.jsonl").read_text().splitlines():
        found = json.loads(line)
        print(line)
        assert max(found["losses"], found["norms"], found["weights"]) < 1e-5, line


def test_ranks_that_share_sequences_compute_what_one_does(tmp_path: Path) -> None:
    run_on_ranks(few_alone, tmp_path, 1)
    (tmp_path / "store").unlink()
    run_on_ranks(few_on_two, tmp_path, 2)
    check(tmp_path)


def refuses(group: Group, folder: Path) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "intermediate_size": 64}
    of_linear: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    of_linear |= {"layer_types": ["linear_attention"] * 2}
    odd = {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 3}
    for more, words in (
        ({"model_type": "qwen3_5_text", **of_linear}, "on parts of a sequence"),
        ({"model_type": "llama", **odd}, "3 heads"),
    ):
        config = load.load(None, ["train.sequence_parallel=2", "train.precision=fp32"])
        network = build_policy(config, small | more, placement(config, group, divided=True))
        asked = deepspeed_config(config, world_size=2, on_gpu=False, load_universal=False)
        with pytest.raises(ConfigError, match=words):
            share_sequences(group, 2).attend(build_engine(network, asked), "sdpa")


def test_models_that_carry_more_along_a_sequence_are_refused(tmp_path: Path) -> None:
    run_on_ranks(refuses, tmp_path, 2)


@pytest.mark.soak
@pytest.mark.timeout(4000)
def test_under_every_zero_stage_on_two_three_and_four_ranks(tmp_path: Path) -> None:
    run_on_ranks(all_alone, tmp_path, 1)
    for number, body in ((2, all_on_two), (3, all_on_three), (4, all_on_four)):
        (tmp_path / "store").unlink()
        run_on_ranks(body, tmp_path, number, timeout_s=1200)
    check(tmp_path)
