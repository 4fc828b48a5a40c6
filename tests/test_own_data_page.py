"""The job files of docs/own-data.md and README.md, with their files, are planned as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from r1hpc.tasks.problems.listed import TEMPLATE

ROOT = Path(__file__).parents[1]
_PAGE = (ROOT / "docs" / "own-data.md").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (job,) = re.findall(r"```yaml\n(.*?)```", _PAGE, re.DOTALL)
    (tmp_path / "own.yaml").write_text(job)
    for name, key in (("demonstrations", "prompt"), ("questions", "question")):
        (line,) = re.findall(rf'^    (\{{"{key}": .*\}})$', _PAGE, re.MULTILINE)
        lines = [line.replace("How many?", f"How many, at house {number}?") for number in range(400)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    _make_model(tmp_path / "model", (tmp_path / "demonstrations.jsonl").read_text())
    return tmp_path


def _make_model(folder: Path, text: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        [text, TEMPLATE], trainer
    )  # a prompt has some fifty tokens, as in a real one
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **size, **ids)).save_pretrained(
        folder
    )


def submit(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "r1hpc.submit", "own.yaml", "--executor", "slurm", "--dry-run", *words]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    return subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True)


def test_the_job_is_planned_with_all_its_stages(folder: Path) -> None:
    done = submit(folder)
    assert done.returncode == 0, done.stderr
    stages = [stage["name"] for stage in yaml.safe_load((folder / "own.yaml").read_text())["stages"]]
    for stage in stages:
        assert stage in done.stdout + done.stderr


def test_more_questions_than_are_held_out_are_refused(folder: Path) -> None:
    done = submit(folder, "grpo:evaluate.num_items=300")
    assert done.returncode == 2
    assert "no more than" in done.stderr
    assert "held-out questions" in done.stderr


def test_the_command_for_those_who_come_from_trl_plans_this_job(folder: Path) -> None:
    page = (ROOT / "docs" / "coming-from-trl.md").read_text()
    (words,) = re.findall(r"^    python -m r1hpc\.submit own\.yaml --dry-run (.*)$", page, re.MULTILINE)
    done = submit(folder, *words.split())
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_readme_is_planned(folder: Path) -> None:
    (job,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "own.yaml").write_text(job)
    done = submit(folder)
    assert done.returncode == 0, done.stderr
