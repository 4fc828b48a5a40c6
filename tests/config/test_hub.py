"""A name on the Hub is the snapshot in the local cache, or a refusal that says which command fetches it."""

import json
from pathlib import Path

import pytest

from r1hpc.base.errors import ConfigError
from r1hpc.config.paths import local_folder, with_absolute_paths
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.plan.model.shape import load_model_config


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As huggingface_hub lays it out."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "home" / "hub" / "models--Qwen--Qwen2.5-7B"
    made = repository / "snapshots" / "abc123"
    made.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    (made / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 7}))
    return made


def test_a_cached_model_is_found_by_its_name(snapshot: Path) -> None:
    config = RunConfig(model=ModelConfig(path="Qwen/Qwen2.5-7B", tokenizer="Qwen/Qwen2.5-7B"))
    assert load_model_config(config, None)["vocab_size"] == 7
    frozen = with_absolute_paths(config).model
    assert (frozen.path, frozen.tokenizer) == (str(snapshot), str(snapshot))


def test_of_several_snapshots_the_one_of_main(snapshot: Path) -> None:
    (snapshot.parent / "older").mkdir()
    assert local_folder("Qwen/Qwen2.5-7B") == str(snapshot)
    (snapshot.parents[1] / "refs" / "main").unlink()
    assert local_folder("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"


def test_a_folder_of_that_name_comes_first(snapshot: Path) -> None:
    Path("Qwen/Qwen2.5-7B").mkdir(parents=True)
    assert local_folder("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"


def test_what_is_not_there_is_refused_with_the_command_that_fetches_it(snapshot: Path) -> None:
    config = with_absolute_paths(RunConfig(model=ModelConfig(path="Qwen/Other")))
    with pytest.raises(
        ConfigError,
        match=r"not in the local cache \(.*\); on the login node: `hf download Qwen/Other`, or with `--local",
    ):
        load_model_config(config, None)


def test_gguf_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "m.Q4_1.gguf").touch()
    for path in (tmp_path, tmp_path / "m.Q4_1.gguf"):
        with pytest.raises(ConfigError, match=rf"r1hpc\.export {tmp_path}/m\.Q4_1\.gguf --out DIR"):
            load_model_config(RunConfig(model=ModelConfig(path=str(path))), None)
