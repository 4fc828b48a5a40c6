"""rollout.engine=vllm with vLLM itself, on a CPU: `make test-vllm`, in an environment of its own."""

import atexit
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.rl import RolloutConfig
from r1hpc.config.schema.run import ModelConfig, Precision, RunConfig, TrainConfig
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rollout import vllm_engine, weight_sync
from r1hpc.train.rollout.torch_engine import Request, Samples, streams
from r1hpc.train.rollout.vllm_engine import VllmSampler
from r1hpc.train.rollout.weight_sync import handover_limit
from tests.train.two_ranks import engine_around, run_on_two_ranks, train

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

IDS = SpecialIds(pad=0, eos=1)
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
QWEN2 |= {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 48, "initializer_range": 0.2}
TIED, UNTIED = QWEN2 | {"tie_word_embeddings": True}, QWEN2 | {"tie_word_embeddings": False}
LLAMA = UNTIED | {"model_type": "llama", "head_dim": 32}
"""A config.json that names no end has that of its class: 2, an ordinary token here."""
BATCH = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(0))


def job(
    group: Group, precision: Precision = Precision.fp32, options: dict[str, Any] | None = None, **rollout: Any
) -> Any:
    config = RunConfig(
        stage="rl",
        train=TrainConfig(precision=precision, seed=7),
        rollout=RolloutConfig(
            engine="vllm",
            poll_every=2,
            max_prompt_length=24,
            max_completion_length=24,
            vllm_options={"kv_cache_memory_bytes": 2**26, **(options or {})},
            **rollout,
        ),
    )
    run = RunDir(group.broadcast(tempfile.mkdtemp() if group.rank == 0 else None))
    atexit.register(shutil.rmtree, run.path, ignore_errors=True)
    watchdog = SimpleNamespace(beat=lambda what: None)
    return SimpleNamespace(config=config, group=group, run=run, watchdog=watchdog)


def largest(sampler: VllmSampler) -> float:
    return sampler.facts()["handover_largest_logprob_difference"]


def request(num_prompts: int = 3, num_generations: int = 4) -> Request:
    prompts = [[4 + i, 9, 3][: 1 + i] for i in range(num_prompts)]
    keys = streams(7, range(num_prompts), num_generations)
    return Request(prompts, keys, num_generations, max_completion_length=12, temperature=0.8)


def sampled(sampler: VllmSampler) -> Samples:
    samples = sampler.sample(request(), lambda: False)
    assert samples is not None
    return samples


# --- bodies: each runs on two ranks, in processes of its own ---


def every_stage(group: Group, folder: Path) -> None:
    """Each layout: the first hand-over, one after one step, one after ten."""
    cases = {
        "tied, ZeRO 1": (1, TIED, ModelConfig()),
        "untied, ZeRO 2": (2, UNTIED, ModelConfig()),
        "tied, ZeRO 3": (3, TIED, ModelConfig()),
        "tied, adapters, ZeRO 3": (3, TIED, ModelConfig(lora_rank=4)),
        "untied, adapters, ZeRO 1": (1, UNTIED, ModelConfig(lora_rank=4, lora_targets=["q_proj", "lm_head"])),
    }
    for name, (stage, hf_config, settings) in cases.items():
        network: Any = build_model(settings, hf_config, seed=3)
        if settings.lora_rank:
            network = wrap_lora(network, settings)
        engine = engine_around(network, stage, Precision.fp32)
        sampler = VllmSampler(job(group), IDS)
        names = []
        for steps in (0, 1, 9):
            train(engine, [BATCH] * steps)
            names.append(sampler.sync_weights(engine.module))
            assert largest(sampler) <= 1e-3, (name, steps, sampler.facts())
        assert len(set(names)) == 3, name
        assert sampler.sync_weights(engine.module) == names[-1], name
        assert len(set(group.gather(names[-1]))) == 1, name
        print(name, sampler.facts(), flush=True)


def half_precision(group: Group, folder: Path) -> None:
    engine = engine_around(build_model(ModelConfig(), TIED, seed=3), 2, Precision.bf16)
    sampler = VllmSampler(job(group, Precision.bf16), IDS)
    for steps in (0, 3):
        train(engine, [BATCH] * steps)
        sampler.sync_weights(engine.module)
        print(sampler.facts(), flush=True)
    for what in ("stale head", "missing layer"):  # what was never handed over shows in half precision too
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vllm_engine, "served_weights", partial(serve, SPOILED[what], None))
            with pytest.raises(TrainError, match="vLLM does not compute what the trainer does"):
                VllmSampler(job(group, Precision.bf16), IDS).sync_weights(engine.module)
    # A policy of one small update before is within the rounding: that it says the same again gives it away.
    engine = engine_around(build_model(ModelConfig(), TIED, seed=3), 1, Precision.bf16, lr=1e-3)
    sampler = VllmSampler(job(group, Precision.bf16), IDS)
    sampler.sync_weights(engine.module)
    train(engine, [BATCH])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler._llm, "collective_rpc", lambda method, kwargs: list(kwargs["weights_iterator"]))
        with pytest.raises(TrainError, match="the hand-over did not reach vLLM"):
            sampler.sync_weights(engine.module)
    assert sampler.facts()["handover_logprob_difference"] < handover_limit(job(group, Precision.bf16).config)
    sampler.sync_weights(engine.module)


def planted(group: Group, folder: Path) -> None:
    """A hand-over that leaves something behind is refused, each kind at the hand-over itself."""
    for hf_config in (TIED, UNTIED):
        for what, spoiled in SPOILED.items():
            engine = engine_around(build_model(ModelConfig(), hf_config, seed=3), 1, Precision.fp32)
            sampler = VllmSampler(job(group), IDS)
            sampler.sync_weights(engine.module)
            before = [(name, value.clone()) for name, value in ORIGINAL(engine.module)]
            train(engine, [BATCH])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vllm_engine, "served_weights", partial(serve, spoiled, before))
                with pytest.raises(TrainError, match="vLLM does not compute what the trainer does"):
                    sampler.sync_weights(engine.module)
            print(what, hf_config["tie_word_embeddings"], sampler.facts(), flush=True)
            sampler.sync_weights(engine.module)  # the next one is whole


def tied_in_vllm(group: Group, folder: Path) -> None:
    """The trap itself: served as a tied model, the packed head stays what the dummy weights made it."""
    network = build_model(ModelConfig(), TIED, seed=3)
    config = weight_sync.served_config
    refusal = r"nats apart on average, and the limit is"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "served_config", lambda m: config(m) | {"tie_word_embeddings": True})
        patch.setattr(vllm_engine, "served_weights", partial(serve, SPOILED["stale head"], None))
        with pytest.raises(TrainError, match=refusal):
            VllmSampler(job(group), IDS).sync_weights(network)


def sampling(group: Group, folder: Path) -> None:
    network = build_model(ModelConfig(), LLAMA, seed=3)
    sampler = VllmSampler(job(group, prove_every=2), IDS)
    torch.manual_seed(5)
    sampler.sync_weights(network)
    drawn = torch.rand(3)
    samples = sampled(sampler)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn), "dropout's stream was moved"
    assert samples.tokens.shape[0] == 12
    assert {bool(ended) for ended in samples.ended} == {True, False}, "both kinds of end are wanted here"
    assert 2 in samples.tokens, "what would end a completion by the config.json is wanted here"
    for row, length in enumerate(samples.lengths):
        prompt, ids = request().prompts[row // 4], samples.tokens[row, :length].tolist()
        assert samples.ended[row] == (ids[-1] == IDS.eos)
        assert IDS.eos not in ids[:-1]
        assert (samples.tokens[row, length:] == IDS.pad).all()
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        plain = (logits / 0.8).log_softmax(-1)[range(int(length)), ids]
        np.testing.assert_allclose(samples.logprobs[row, :length], plain.numpy(), atol=1e-4)
    again = sampled(sampler)
    assert (again.tokens == samples.tokens).all()
    # Asked to stop it stops, and can sample again.
    answers = iter([False, True])
    assert sampler.sample(request(), lambda: next(answers)) is None
    assert (sampled(sampler).tokens == samples.tokens).all()
    # The second hand-over is not proven, the third is.
    sampler.sync_weights(network)
    assert "handover_logprob_difference" not in sampler.facts()
    sampler.sync_weights(network)
    assert "handover_logprob_difference" in sampler.facts()


def more_prompts_than_a_step_takes(group: Group, folder: Path) -> None:
    """12 prompts of 20 tokens, 48 a step: read in two, one has its generator wound back, which no CPU can."""
    network = build_model(ModelConfig(), UNTIED, seed=3)
    sampler = VllmSampler(job(group, options={"max_num_batched_tokens": 48, "max_num_seqs": 16}), IDS)
    sampler.sync_weights(network)
    asked = Request([[4 + i, 9] * 10 for i in range(3)], streams(7, range(3), 4), 4, 12, 0.8)
    samples = sampler.sample(asked, lambda: False)
    assert samples is not None
    assert (samples.lengths > 0).all()


def refused(group: Group, folder: Path) -> None:
    """A head dimension that the CPU's kernels lack, a context that the model has not."""
    narrow = build_model(ModelConfig(), UNTIED | {"hidden_size": 48}, seed=3)
    with pytest.raises(R1hpcError, match=r"vLLM cannot run this model .* on rank 0 it said"):
        VllmSampler(job(group), IDS).sync_weights(narrow)
    short = build_model(ModelConfig(), UNTIED | {"max_position_embeddings": 32}, seed=3)
    with pytest.raises(R1hpcError, match="vLLM cannot run this model"):
        VllmSampler(job(group), IDS).sync_weights(short)


Pairs = Iterator[tuple[str, torch.Tensor]]
ORIGINAL = weight_sync.served_weights
SPOILED: dict[str, Callable[[Any, Pairs], Pairs]] = {
    "stale head": lambda before, now: (p for p in now if p[0] != "lm_head.weight"),
    "missing layer": lambda before, now: (p for p in now if not p[0].startswith("model.layers.1.")),
    "old policy": lambda before, now: iter(before),
}


def serve(spoiled: Callable[[Any, Pairs], Pairs], before: Any, network: Any) -> Pairs:
    """In place of served_weights: what is left of it."""
    return spoiled(before, ORIGINAL(network))


BODIES = (
    every_stage,
    planted,
    tied_in_vllm,
    half_precision,
    sampling,
    more_prompts_than_a_step_takes,
    refused,
)


def in_turn(group: Group, folder: Path) -> None:
    """Every body in one process a rank: to import vLLM takes longer than most of them."""
    for body in BODIES:
        said = ""
        try:
            body(group, folder)
        except Exception:
            said = traceback.format_exc()
        (folder / f"{body.__name__}-{group.rank}").write_text(said)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each body failed with on each rank."""
    folder = tmp_path_factory.mktemp("bodies")
    run_on_two_ranks(in_turn, folder, timeout_s=1700)
    return folder


@pytest.mark.parametrize("body", [body.__name__ for body in BODIES])
def test_beside_the_trainer(body: str, said: Path) -> None:
    assert [(said / f"{body}-{rank}").read_text() for rank in (0, 1)] == ["", ""]
