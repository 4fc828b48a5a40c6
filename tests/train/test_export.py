"""The exported folder is the model: under every ZeRO stage, after every kill, in one file or in several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig, Precision
from r1hpc.tasks.text.tokenizer import TokenizerFiles
from r1hpc.train.model import export
from r1hpc.train.model.attention import add_gates, load_gates
from r1hpc.train.model.export import export_model, readable_by_older
from r1hpc.train.model.model import build_model, cast_parameters
from r1hpc.train.parallel.distributed import Group, join, leave
from r1hpc.train.parallel.errors import SaveError
from tests.train.two_ranks import engine_around, gathered, run_on_two_ranks, train

pytestmark = pytest.mark.xdist_group("export")  # its fixtures are dear

IDS = torch.tensor([[1, 5, 2, 7, 3, 3, 9], [4, 4, 8, 1, 0, 6, 2]])
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 32,
    "vocab_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN2 |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 24, "tie_word_embeddings": False}
CASES = {
    "zero-0": (0, Precision.fp32, "sdpa", GPT2),
    "zero-1": (1, Precision.fp32, "sdpa", QWEN2),
    "zero-2": (2, Precision.bf16, "sdpa", QWEN2),
    "zero-3": (3, Precision.fp32, "sdpa", GPT2),
    "zero-3-bf16": (3, Precision.bf16, "gate", QWEN2),
}


def model(hf_config: dict[str, Any], attention: str = "sdpa", path: Path | None = None) -> Any:
    settings = ModelConfig(path=None if path is None else str(path), attn_implementation=attention)
    return build_model(settings, hf_config, seed=3)


def tokenizer() -> TokenizerFiles:
    made = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1, "x": 2}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    files = {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return TokenizerFiles(files, stops=(1,))


@torch.no_grad()
def logits(network: Any) -> Tensor:
    network.eval()
    result: Tensor = network(input_ids=IDS).logits.float()
    return result


def export_all(group: Group, folder: Path) -> None:
    """Train each case for two steps, export it, and note what the engine itself computes."""
    for name, (stage, precision, attention, hf_config) in CASES.items():
        engine = engine_around(model(hf_config, attention), stage, precision)
        train(engine, [IDS, IDS.flip(0)])
        export_model(engine.module, group, folder / name, tokenizer())
        seen = {"logits": logits(engine), "weights": gathered(engine.module)}
        if group.rank == 0:
            torch.save(seen, folder / f"{name}.pt")
        engine.train()
        train(engine, [IDS])  # the engine goes on after an export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    run_on_two_ranks(export_all, folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_loads_with_the_logits_of_the_engine(exported: Path, name: str) -> None:
    _, precision, attention, _ = CASES[name]
    folder = exported / name
    hf_config = json.loads((folder / "config.json").read_text())
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    assert hf_config["dtype"] == str(dtype).removeprefix("torch.")
    if attention == "sdpa":
        loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        assert loaded.dtype == dtype
        assert loaded.config.use_cache
    else:
        loaded = model(hf_config, attention, folder)
        cast_parameters(loaded, dtype)
    seen = torch.load(exported / f"{name}.pt")
    assert all(torch.equal(p, seen["weights"][key]) for key, p in loaded.named_parameters())
    # ZeRO 3 brings a linear layer of its own that rounds a bias by itself: one bit of bf16.
    atol = 0.005 if name == "zero-3-bf16" else 0
    torch.testing.assert_close(logits(loaded), seen["logits"], rtol=0, atol=atol)


def test_its_files_are_as_open_as_the_umask_lets_them(exported: Path) -> None:
    """safetensors writes for its owner alone."""
    modes = {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_transformers_4_reads_the_same_rotary_base() -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0}
    values = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, **scaled}}
    assert readable_by_older(values) == {
        **values,
        "torch_dtype": "bfloat16",
        "rope_theta": 5e5,
        "rope_scaling": scaled,
    }
    plain = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert "rope_scaling" not in readable_by_older(plain)
    assert readable_by_older({"model_type": "gpt2"}) == {"model_type": "gpt2"}


def test_transformers_4_reads_rotary_positions_of_every_kind() -> None:
    each = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    gemma = readable_by_older({"model_type": "gemma3_text", "rope_parameters": each})
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    part = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.4}
    assert readable_by_older({"model_type": "gpt_neox", "rope_parameters": part})["rotary_pct"] == 0.4
    assert readable_by_older({"model_type": "phi", "rope_parameters": part})["partial_rotary_factor"] == 0.4
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "rope_theta": 1e4}
    phi3 = readable_by_older({"model_type": "phi3", "rope_parameters": {**long, "type": "longrope"}})
    assert phi3["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("gemma3_text", {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}),
        ("gpt_neox", {"partial_rotary_factor": 0.4, "rope_theta": 1e4, "rope_type": "default"}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}),
        (
            "llama",
            {
                **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.2},
                **{"short_factor": [1.0] * 64, "long_factor": [2.0] * 64},
                "original_max_position_embeddings": 4096,
            },
        ),
    ],
)
def test_transformers_5_reads_what_is_added_as_what_was_there(family: str, rope: dict[str, Any]) -> None:
    default = {"rope_theta": 1e4, "rope_type": "default"}
    if "full_attention" in rope:
        rope = {**rope, "sliding_attention": default}
    written = json.loads(AutoConfig.for_model(family, rope_parameters=rope).to_json_string())
    given = {key: value for key, value in readable_by_older(written).items() if key != "model_type"}
    read = json.loads(AutoConfig.for_model(family, **given).to_json_string())
    assert read["rope_parameters"] == written["rope_parameters"]


def test_an_attention_of_ours_is_refused_by_all_others(exported: Path) -> None:
    folder = exported / "zero-3-bf16"
    hf_config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ConfigError, match="trained with attn_implementation=gate"):
        model(hf_config, "sdpa", folder)


def test_transformers_alone_computes_nothing_else_with_the_weights(exported: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported / "zero-3-bf16", local_files_only=True)
    with pytest.raises(ConfigError, match="add_gates"):
        logits(loaded)
    add_gates(loaded, "gate")
    load_gates(loaded, exported / "zero-3-bf16")
    expected = torch.load(exported / "zero-3-bf16.pt")["logits"]
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0.005)


def test_the_tokenizer_loads_as_it_is(exported: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(exported / "zero-0", local_files_only=True)
    assert loaded("x x")["input_ids"] == [2, 2]
    assert loaded.eos_token == "<eos>"


def test_nothing_but_the_folders_is_left(exported: Path) -> None:
    assert not [path for path in exported.iterdir() if path.name.startswith(".")]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")  # join sets them; this puts them back
    yield join(0, 0, 1, HashStore(), use_gpu=False)
    leave()


def test_several_files(alone: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MAX_FILE_SIZE", 8000)
    network = model(QWEN2)
    export_model(network, alone, tmp_path / "model", None)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    torch.testing.assert_close(logits(loaded), logits(network), rtol=0, atol=0)


def test_another_model_replaces_it(alone: Group, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_model(model(QWEN2), alone, folder, tokenizer())
    export_model(model(GPT2), alone, folder, tokenizer())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_told_and_keeps_the_old_folder(
    alone: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    export_model(model(GPT2), alone, folder, None)
    monkeypatch.setenv("R1HPC_FAILPOINT", "export.file:enospc::*")
    with pytest.raises(SaveError, match="No space left"):
        export_model(model(QWEN2), alone, folder, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize("point", ["export.file", "export.small", "export.moved_aside"])
def test_ended_anywhere_the_next_export_succeeds(
    alone: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    folder = tmp_path / "model"
    export_model(model(GPT2), alone, folder, None)
    network = model(QWEN2)
    # Nothing catches a RuntimeError: the files stay as a SIGKILL would leave them.
    monkeypatch.setenv("R1HPC_FAILPOINT", f"{point}:raise::*")
    with pytest.raises(RuntimeError, match=point):
        export_model(network, alone, folder, None)
    monkeypatch.delenv("R1HPC_FAILPOINT")
    if folder.exists():
        assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    export_model(network, alone, folder, None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    torch.testing.assert_close(logits(loaded), logits(network), rtol=0, atol=0)
