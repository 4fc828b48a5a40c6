"""A user's model folder, in any form: loaded with transformers' own first loss, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.train.model.model import build_model

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2}
UNTIED: dict[str, Any] = {"model_type": "llama", **SHAPE, "vocab_size": 64, "tie_word_embeddings": False}
TIED: dict[str, Any] = {"model_type": "qwen2", **SHAPE, "vocab_size": 64, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 64}
IDS = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0))


def saved(folder: Path, config: dict[str, Any], **options: Any) -> Any:
    """A random model as transformers saves it."""
    torch.manual_seed(7)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    network.save_pretrained(folder, **options)
    return network


def loaded(folder: Path, **settings: Any) -> Any:
    config = {**json.loads((folder / "config.json").read_text()), **settings.get("config", {})}
    return build_model(ModelConfig(path=str(folder), **settings), config, seed=1)


@torch.no_grad()
def first_loss(network: Any) -> torch.Tensor:
    """The loss of the first step, without dropout."""
    logits = network.eval()(input_ids=IDS[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())


@torch.no_grad()
def loss_of_transformers(folder: Path) -> torch.Tensor:
    """By transformers alone, its own shift and mean included."""
    network = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    loss: torch.Tensor = network.eval()(input_ids=IDS, labels=IDS).loss
    return loss


def as_bin(folder: Path) -> None:
    """As folders of before safetensors are, old buffers among the weights."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, folder / "pytorch_model.bin")


def as_sharded_bin(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"pytorch_model-0000{1 + at % 2}-of-00002.bin" for at, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        torch.save({n: w for n, w in weights.items() if names[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("config", [UNTIED, TIED, GPT2], ids=["untied", "tied", "gpt2"])
@pytest.mark.parametrize(
    ("change", "options"),
    [(nothing, {}), (nothing, {"max_shard_size": "20KB"}), (as_bin, {}), (as_sharded_bin, {})],
    ids=["safetensors", "sharded", "bin", "sharded-bin"],
)
def test_every_form_has_the_first_loss_of_transformers(
    tmp_path: Path, config: dict[str, Any], change: Callable[[Path], None], options: dict[str, Any]
) -> None:
    network = saved(tmp_path, config, **options)
    change(tmp_path)
    if options:
        assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    ours = first_loss(loaded(tmp_path))
    torch.testing.assert_close(ours, first_loss(network), rtol=0, atol=0)
    torch.testing.assert_close(ours, loss_of_transformers(tmp_path), rtol=0, atol=1e-5)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    saved(tmp_path, UNTIED)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 2 tensors .*: lm_head\.weight, model\.layers\.1\.mlp\.up_"):
        loaded(tmp_path)


def test_the_head_of_a_tied_model_may_be_missing_or_there(tmp_path: Path) -> None:
    network = saved(tmp_path, TIED)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(first_loss(loaded(tmp_path)), first_loss(network), rtol=0, atol=0)


def test_what_the_model_has_no_place_for_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = saved(tmp_path, UNTIED)
    weights = {**load_file(tmp_path / "model.safetensors"), "v_head.weight": torch.ones(1, 32)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(first_loss(loaded(tmp_path)), first_loss(network), rtol=0, atol=0)
    assert "hold 1 tensors that a LlamaForCausalLM of this config does not have: v_head.weight" in (
        capsys.readouterr().out
    )


def test_another_vocabulary_is_named_with_both_shapes(tmp_path: Path) -> None:
    saved(tmp_path, UNTIED)
    with pytest.raises(
        ConfigError, match=r"lm_head\.weight is \(64, 32\) there and \(80, 32\) in the config, model\.embed"
    ):
        loaded(tmp_path, config={"vocab_size": 80})


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    saved(tmp_path, UNTIED)
    with pytest.raises(ConfigError, match=r"lack 9 tensors .*: model\.layers\.2\."):
        loaded(tmp_path, config={"num_hidden_layers": 3})


def test_a_torn_file_and_no_file(tmp_path: Path) -> None:
    saved(tmp_path, UNTIED)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        loaded(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded: "):
        loaded(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"model\.from_scratch=true"):
        loaded(tmp_path)
    begun = loaded(tmp_path, from_scratch=True)
    torch.manual_seed(1)
    expected = AutoModelForCausalLM.from_config(AutoConfig.for_model(**UNTIED), dtype=torch.float32)
    torch.testing.assert_close(first_loss(begun), first_loss(expected), rtol=0, atol=0)
