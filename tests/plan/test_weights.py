"""A model folder without weights that can be loaded is refused: training must not begin at random unasked."""

import json
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.plan.model.weights import check_weights, weight_files

_INDEX = "model.safetensors.index.json"


def folder_with(folder: Path, *names: str) -> ModelConfig:
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ((), "copy them there, or set model.from_scratch=true"),
        (("consolidated.00.pth", "tokenizer.json"), "it holds consolidated.00.pth; transformers'"),
        (("adapter_model.safetensors",), "it holds adapter_model.safetensors"),
        (("model-00001-of-00002.safetensors",), "it holds model-00001-of-00002.safetensors"),
        ((_INDEX,), "restore it"),
    ],
)
def test_no_weights_are_refused_with_what_to_do(tmp_path: Path, names: tuple[str, ...], advice: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_weights(folder_with(tmp_path, *names))
    assert advice in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    check_weights(ModelConfig(path=str(tmp_path), from_scratch=True))


def test_every_file_of_an_index_must_be_there(tmp_path: Path) -> None:
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    model = folder_with(tmp_path, "model-1.safetensors")
    (tmp_path / _INDEX).write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(ConfigError, match=r"lacks 1 of the files .* names: model-2\.safetensors"):
        check_weights(model)
    (tmp_path / "model-2.safetensors").touch()
    check_weights(model)


def test_one_file_is_enough_and_a_model_by_its_config_needs_none(tmp_path: Path) -> None:
    check_weights(folder_with(tmp_path, "pytorch_model.bin"))
    assert [path.name for path in weight_files(tmp_path)] == ["pytorch_model.bin"]
    check_weights(
        folder_with(tmp_path, "model.safetensors")
    )  # as transformers, which takes it before the other
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]
    check_weights(ModelConfig(config={"model_type": "llama"}))
