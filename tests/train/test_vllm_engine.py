"""The vLLM engine. MOCK: vLLM needs a GPU, so all but the first test drive a stand-in that records calls.

They show that we call what vLLM documents, in an order that makes sense; not that vLLM does what we think.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.config.reasoning import RolloutConfig
from r1hpc.config.schema import ModelConfig, TrainConfig
from r1hpc.tasks.tokenizer import SpecialIds
from r1hpc.train.model import build_model, wrap_lora
from r1hpc.train.sampling import Request, streams
from r1hpc.train.vllm_engine import VllmSampler

IDS = SpecialIds(pad=0, eos=1)
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
QWEN2 |= {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 24, "tie_word_embeddings": True}


def job(model: ModelConfig | None = None, device: str = "cuda", **rollout: Any) -> Any:
    config = SimpleNamespace(
        model=model or ModelConfig(),
        rollout=RolloutConfig(poll_every=2, **rollout),
        train=TrainConfig(seed=7),
    )
    return SimpleNamespace(config=config, group=SimpleNamespace(device=torch.device(device)))


class MockEngine:
    """Answers request `c-row` with `row` tokens of id 5, then the end token; one token a step.

    Row 3 never ends by itself. The log-probability of a token is minus its position.
    """

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.waiting: dict[str, Any] = {}
        self.num_steps = 0

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.waiting[request_id] = params
        self.calls.append(("add", request_id, prompt["prompt_token_ids"], params))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def abort_request(self, request_ids: list[str]) -> None:
        self.calls.append(("abort", request_ids))
        self.waiting.clear()

    def step(self) -> list[Any]:
        self.num_steps += 1
        outputs = []
        for name, params in list(self.waiting.items()):
            row = int(name.split("-")[1])
            most = params["max_tokens"]
            tokens = [5] * most if row == 3 else [5] * row + [1]
            over = self.num_steps >= len(tokens)
            logprobs = [{token: SimpleNamespace(logprob=-i)} for i, token in enumerate(tokens)]
            answer = SimpleNamespace(
                token_ids=tuple(tokens), logprobs=logprobs, finish_reason="length" if row == 3 else "stop"
            )
            outputs.append(SimpleNamespace(request_id=name, finished=over, outputs=[answer]))
            if over:
                del self.waiting[name]
        return outputs


class MockLLM:
    """vllm.LLM as far as it is used."""

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.hf_config = AutoConfig.from_pretrained(model)
        self.calls: list[Any] = []
        self.loaded: dict[str, torch.Tensor] = {}
        self.llm_engine = MockEngine(self.calls)

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> set[str]:
        self.loaded |= {name: value.clone() for name, value in weights}
        return {name for name, _ in weights}

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self)]

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake_up", *tags))

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache",))


@pytest.fixture
def mock_vllm(monkeypatch: pytest.MonkeyPatch) -> list[MockLLM]:
    made: list[MockLLM] = []

    def start(model: str, **options: Any) -> MockLLM:
        made.append(MockLLM(model, **options))
        return made[-1]

    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.TokensPrompt = start, dict, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # put back afterwards
    return made


def test_without_vllm_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(R1hpcError, match=r"pip install 'r1hpc\[vllm\]', or use rollout.engine=sampler"):
        VllmSampler(job(), IDS)


@pytest.mark.usefixtures("mock_vllm")
def test_what_vllm_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="softmax attention"):
        VllmSampler(job(ModelConfig(attn_implementation="gate")), IDS)
    with pytest.raises(R1hpcError, match="needs GPUs"):
        VllmSampler(job(device="cpu"), IDS)


def test_the_weights_are_handed_over_under_their_exported_names(mock_vllm: list[MockLLM]) -> None:
    sampler = VllmSampler(job(vllm_options={"gpu_memory_utilization": 0.5}), IDS)
    network = build_model(ModelConfig(), QWEN2, seed=1)
    first = sampler.sync_weights(network)
    (llm,) = mock_vllm
    assert llm.options["gpu_memory_utilization"] == 0.5
    assert llm.options["max_model_len"] == 128
    assert llm.options["dtype"] == "float32"
    assert llm.hf_config.hidden_size == 16
    expected = dict(network.named_parameters())  # the tied head is not among them
    assert llm.loaded.keys() == expected.keys()
    assert all(torch.equal(llm.loaded[name], expected[name]) for name in expected)
    sampler.release()
    assert sampler.sync_weights(network) == first
    with torch.no_grad():
        network.get_parameter("model.norm.weight").add_(1)
    assert sampler.sync_weights(network) != first
    assert len(mock_vllm) == 1
    cleared = ("reset_prefix_cache",)
    woken = [("wake_up", "weights"), ("wake_up", "kv_cache"), cleared]
    assert llm.calls == [cleared, ("sleep", 2), *woken, cleared]


def test_adapters_are_merged(mock_vllm: list[MockLLM], tmp_path: Path) -> None:
    settings = ModelConfig(lora_rank=2, lora_targets=["q_proj"])
    network = wrap_lora(build_model(settings, QWEN2, seed=1), settings)
    layer = network.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    VllmSampler(job(), IDS).sync_weights(network)
    loaded = mock_vllm[0].loaded
    assert not [name for name in loaded if "lora" in name or "base" in name]
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(loaded["model.layers.0.self_attn.q_proj.weight"], merged)


def request(num_prompts: int = 2, num_generations: int = 2) -> Request:
    prompts = [[4 + i, 9] for i in range(num_prompts)]
    keys = streams(7, range(num_prompts), num_generations)
    return Request(prompts, keys, num_generations, max_completion_length=6, temperature=0.8)


def test_every_completion_is_a_request_with_its_own_seed(mock_vllm: list[MockLLM]) -> None:
    sampler = VllmSampler(job(), IDS)
    sampler.sync_weights(build_model(ModelConfig(), QWEN2, seed=1))
    samples = sampler.sample(request(), lambda: False)
    added = [call for call in mock_vllm[0].calls if call[0] == "add"]
    assert [call[2] for call in added] == [[4, 9], [4, 9], [5, 9], [5, 9]]
    assert len({call[3]["seed"] for call in added}) == 4
    assert all(0 <= call[3]["seed"] < 2**63 for call in added)
    assert all(call[3]["temperature"] == 0.8 and call[3]["stop_token_ids"] == [1] for call in added)
    assert samples is not None
    assert samples.tokens.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [5, 1, 0, 0, 0, 0],
        [5, 5, 1, 0, 0, 0],
        [5, 5, 5, 5, 5, 5],
    ]
    assert samples.lengths.tolist() == [1, 2, 3, 6]
    assert samples.ended.tolist() == [True, True, True, False]
    assert samples.logprobs[2].tolist() == [0, -1, -2, 0, 0, 0]
    assert samples.tokens.dtype == np.dtype(np.int32)
    assert samples.logprobs.dtype == np.dtype(np.float32)


def test_asked_to_stop_it_aborts_what_is_unfinished(mock_vllm: list[MockLLM]) -> None:
    sampler = VllmSampler(job(), IDS)
    sampler.sync_weights(build_model(ModelConfig(), QWEN2, seed=1))
    engine = mock_vllm[0].llm_engine
    assert sampler.sample(request(), lambda: engine.num_steps >= 2) is None
    assert mock_vllm[0].calls[-1] == ("abort", ["1-2", "1-3"])
    assert sampler.sample(request(), lambda: False) is not None  # and it can sample again
