"""A tokenizer goes through one stage after the other and out into plain transformers as it came in."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from r1hpc.config.schema.run import ModelConfig
from r1hpc.tasks.text.format import encode
from r1hpc.tasks.text.tokenizer import (
    exported_tokenizer,
    form_of,
    load_tokenizer,
    special_ids,
    vocabulary_size,
)
from r1hpc.train.model.export import export_model
from r1hpc.train.model.model import build_model
from r1hpc.train.parallel.distributed import Group, join, leave
from r1hpc.train.quantize.model_folders import convert_gguf
from tests.fetched import DEEPSEEK, SMOLLM2, wheel_member
from tests.tasks.tokenizers_of_others import deepseek_like, gemma_like, llama3_like

# Not qwen2: transformers 5 takes Qwen's tokenizer for it, whatever lies in the folder.
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
QUESTION = "What is 23 + 34?\nThink: \u00e9\u4e2d\U0001f600 <think>"


def smollm2(folder: Path) -> Path:
    """SmolLM2's tokenizer, as its GGUF holds it."""
    pytest.importorskip("gguf", reason="reading GGUF needs the package gguf")
    kept = wheel_member(*SMOLLM2).parent / "folder"
    if not kept.is_dir():
        convert_gguf(wheel_member(*SMOLLM2), kept)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((kept / name).read_bytes())
    return folder


def deepseek(folder: Path) -> Path:
    return deepseek_like(folder, wheel_member(*DEEPSEEK))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")  # join sets them; this puts them back
    yield join(0, 0, 1, HashStore(), use_gpu=False)
    leave()


def seen_by_r1hpc(folder: Path) -> dict[str, Any]:
    model = ModelConfig(path=str(folder))
    tokenizer = load_tokenizer(model)
    form = form_of(tokenizer, model)
    ids = special_ids(tokenizer, model)
    return {
        "prompt": encode(tokenizer, form.prompt(QUESTION)),
        "form": form.id,
        "stops": set(ids.stops),
        "pad": ids.pad,
    }


def seen_by_transformers(folder: Path) -> dict[str, Any]:
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    named = {name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "prompt": prompt,
        "template": theirs.chat_template,
        "plain": theirs(QUESTION)["input_ids"],
        **named,
    }


@pytest.mark.parametrize("make", [llama3_like, gemma_like, deepseek, smollm2])
def test_three_stages_later_it_is_the_same(
    tmp_path: Path, alone: Group, make: Callable[[Path], Path]
) -> None:
    start = make(tmp_path / "start")
    size = vocabulary_size(load_tokenizer(ModelConfig(path=str(start))))
    assert make is not deepseek or size == 129_280
    (start / "config.json").write_text(json.dumps({**TINY, "vocab_size": size}))
    ours, theirs = seen_by_r1hpc(start), seen_by_transformers(start)
    assert ours["prompt"] == theirs["prompt"]

    settings = ModelConfig(path=str(start), from_scratch=True)
    for stage in ("sft", "rl", "again"):
        network = build_model(
            settings, json.loads(Path(settings.path or "", "config.json").read_text()), seed=0
        )
        export_model(network, alone, tmp_path / stage, exported_tokenizer(settings))
        settings = ModelConfig(path=str(tmp_path / stage))
        assert seen_by_r1hpc(tmp_path / stage) == ours, stage
    assert seen_by_transformers(tmp_path / "again") == theirs
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", local_files_only=True)
    ends = loaded.generation_config.eos_token_id
    assert {*(ends if isinstance(ends, list) else [ends])} == ours["stops"]
    assert isinstance(GenerationConfig.from_pretrained(tmp_path / "again"), GenerationConfig)
