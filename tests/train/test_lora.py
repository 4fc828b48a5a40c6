"""Adapters under DeepSpeed: the model itself never changes, and merged it computes what the adapters did."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.config.schema.run import ModelConfig, Precision
from r1hpc.train.checkpoint.deepspeed_io import CheckpointFiles
from r1hpc.train.model.export import export_model
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rollout.policy import without_adapters
from tests.train.two_ranks import engine_around, gathered, run_on_two_ranks, train

pytestmark = pytest.mark.xdist_group("lora")  # its fixtures are dear

IDS = torch.tensor([[1, 5, 2, 7, 3, 3, 9], [4, 4, 8, 1, 0, 6, 2]])
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 24}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN2 |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 24, "tie_word_embeddings": False}
CASES = {
    "zero-1": (1, Precision.fp32, GPT2),
    "zero-2-bf16": (2, Precision.bf16, QWEN2),
    "zero-3": (3, Precision.fp32, QWEN2),
    "embeddings": (1, Precision.fp32, QWEN2),
}
LORA = ModelConfig(lora_rank=4, lora_alpha=8.0)
TARGETS = {"embeddings": replace(LORA, lora_targets=["q_proj", "embed_tokens", "lm_head"])}


def wrapped(hf_config: dict[str, Any], settings: ModelConfig = LORA) -> Any:
    return wrap_lora(build_model(settings, hf_config, seed=3), settings)


@torch.no_grad()
def logits(network: Any) -> Tensor:
    result: Tensor = network(input_ids=IDS).logits.float()
    return result


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def train_all(group: Group, folder: Path) -> None:
    """Each case: four steps with looks at the reference between them, saved after two; what came of it."""
    for name, (stage, precision, hf_config) in CASES.items():
        settings = TARGETS.get(name, LORA)
        engine = engine_around(wrapped(hf_config, settings), stage, precision)
        seen = {"before": gathered(engine.module), "logits_before": logits(engine)}
        train(engine, [IDS, IDS.flip(0)])
        CheckpointFiles(group, stage, asynchronous=False, ranks_per_node=2).attach(engine)
        engine.save_checkpoint(str(folder / f"{name}-state"), tag="t", save_latest=False)
        with without_adapters(engine.module):
            assert not engine.module.training  # a model's own dropout is off
            seen["logits_reference"] = logits(engine)
        assert engine.module.training
        train(engine, [IDS, IDS.flip(0)])
        seen["after"] = gathered(engine.module)
        seen["logits_after"] = logits(engine)
        export_model(engine.module, group, folder / name, None)
        resumed = engine_around(wrapped(hf_config, settings), stage, precision)
        CheckpointFiles(group, stage, asynchronous=False, ranks_per_node=2).attach(resumed)
        resumed.load_checkpoint(str(folder / f"{name}-state"), tag="t")
        train(resumed, [IDS, IDS.flip(0)])
        seen["resumed"] = gathered(resumed.module)
        if group.rank == 0:
            torch.save(seen, folder / f"{name}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    run_on_two_ranks(train_all, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_only_the_adapters_are_trained(trained: Path, name: str) -> None:
    seen = torch.load(trained / f"{name}.pt")
    before, after = seen["before"], seen["after"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if is_adapter(key)}


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_the_model_before(trained: Path, name: str) -> None:
    seen = torch.load(trained / f"{name}.pt")
    torch.testing.assert_close(seen["logits_reference"], seen["logits_before"], rtol=0, atol=0)
    assert not torch.equal(seen["logits_after"], seen["logits_before"])


@pytest.mark.parametrize("name", CASES)
def test_resumed_without_a_look_at_the_reference_it_is_the_same_run(trained: Path, name: str) -> None:
    seen = torch.load(trained / f"{name}.pt")
    assert all(torch.equal(seen["after"][key], seen["resumed"][key]) for key in seen["after"])


def test_under_zero_2_the_base_is_in_a_checkpoint_once(trained: Path) -> None:
    """DeepSpeed would put it there twice, and copy it on every rank."""
    (file,) = (trained / "zero-2-bf16-state").glob("**/mp_rank_*")
    state = torch.load(file, weights_only=False)
    assert state["frozen_param_fragments"] is None
    assert not [name for name in state["module"] if name.endswith("weight")], "those are in parts"


@pytest.mark.parametrize("name", CASES)
def test_merged_it_computes_what_the_adapters_did(trained: Path, name: str) -> None:
    seen = torch.load(trained / f"{name}.pt")
    merged = AutoModelForCausalLM.from_pretrained(trained / name, local_files_only=True)
    assert not [key for key in merged.state_dict() if "lora" in key]
    rounding = 2e-2 if CASES[name][1] is Precision.bf16 else 1e-5
    torch.testing.assert_close(logits(merged.eval()), seen["logits_after"], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", CASES)
def test_alone_over_the_model_they_were_trained_on_they_compute_the_same(trained: Path, name: str) -> None:
    """As peft loads them, which takes no word of ours for what is in the files."""
    peft = pytest.importorskip("peft")
    _, precision, hf_config = CASES[name]
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    base = build_model(ModelConfig(), hf_config, seed=3).to(dtype)
    adapted = peft.PeftModel.from_pretrained(base, str(trained / name / "adapter")).eval()
    expected = torch.load(trained / f"{name}.pt")["logits_after"]
    rounding = 2e-2 if precision is Precision.bf16 else 1e-5
    torch.testing.assert_close(logits(adapted), expected, rtol=rounding, atol=rounding)
    assert sorted(path.name for path in (trained / name / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    targets = json.loads((trained / name / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets), "the same file in every process"


@pytest.mark.parametrize(("hf_config", "num_layers"), [(GPT2, 8), (QWEN2, 14)])
def test_every_linear_layer_but_the_head_by_default(hf_config: dict[str, Any], num_layers: int) -> None:
    names = [name for name, p in wrapped(hf_config).named_parameters() if p.requires_grad]
    assert all(is_adapter(name) for name in names)
    assert len(names) == 2 * num_layers
    assert not [name for name in names if "lm_head" in name]


def test_named_layers_only() -> None:
    settings = ModelConfig(lora_rank=2, lora_targets=["q_proj", "v_proj"])
    names = [name for name, p in wrapped(QWEN2, settings).named_parameters() if p.requires_grad]
    assert len(names) == 8
    assert all("q_proj" in name or "v_proj" in name for name in names)


def test_a_wrapped_model_computes_the_same() -> None:
    plain: nn.Module = build_model(ModelConfig(), QWEN2, seed=3)
    assert torch.equal(logits(plain), logits(wrapped(QWEN2)))


def test_a_target_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_targets=\['qproj'\]"):
        wrapped(QWEN2, ModelConfig(lora_rank=2, lora_targets=["qproj"]))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_modules_is_refused(target: str) -> None:
    """The export has one tensor for both: it would lose the adapter, or put it on the other one too."""
    settings = ModelConfig(lora_rank=2, lora_targets=["q_proj", target])
    with pytest.raises(ConfigError, match=f"names {target}, and .* share their weights: leave it out"):
        wrapped(QWEN2 | {"tie_word_embeddings": True}, settings)
    wrapped(QWEN2 | {"tie_word_embeddings": False}, settings)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(R1hpcError, match=r"r1hpc\[lora\]"):
        wrapped(QWEN2)
