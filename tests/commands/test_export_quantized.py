"""export --quantize: measured beside its original, and called no worse only where the questions show it."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from r1hpc import chat, export
from r1hpc.base.errors import ConfigError, R1hpcError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig
from r1hpc.submit import main as submit
from r1hpc.tasks.text.format import encode
from r1hpc.tasks.text.tokenizer import character_tokenizer, exported_tokenizer
from r1hpc.train.quantize import measure
from r1hpc.train.quantize.quantize import quantize
from tests import runs

SAID = "<think></think><answer>7</answer>"
DOWN = "model.layers.0.mlp.down_proj.weight_scale"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run whose model rightly answers 7 to every question: each token follows from the last."""
    root = tmp_path_factory.mktemp("runs")
    questions = root / "questions.jsonl"
    lines = [{"question": f"{n}-{n - 7}=", "answer": "7"} for n in range(7, 907)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = load.load("rl_smoke")
    made = RunDir(root / "sevens")
    made.create()
    load.save(
        replace(
            base,
            task=replace(base.task, name="file", options={"path": str(questions), "template": "{question}"}),
            rollout=replace(
                base.rollout, max_prompt_length=16, max_completion_length=12, prompts_per_batch=64
            ),
            evaluate=replace(base.evaluate, num_items=60),
        ),
        made.config,
    )
    _parrot(made.model)
    made.finished.write_text("{}")
    return made


def _parrot(folder: Path) -> None:
    tokenizer = character_tokenizer()
    ids = [*encode(tokenizer, f"={SAID}"), 1]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=27, tie_word_embeddings=False, eos_token_id=1, **shape))
    with torch.no_grad():
        network.model.layers[0].self_attn.o_proj.weight.zero_()
        network.model.embed_tokens.weight.copy_(torch.eye(27, 32))
        network.lm_head.weight.zero_()
        for last, following in pairwise(ids):
            network.lm_head.weight[following, last] = 1
    network.save_pretrained(folder)
    files = exported_tokenizer(replace(RunConfig().model, tokenizer="characters")).files
    for name, content in files.items():
        (folder / name).write_bytes(content)


def exported(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = export.main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_an_export_that_answers_as_its_original_is_no_worse(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run.path), "--quantize", "int8", "--calibrate", "8", "--margin", "0.1"]
    status, answer = exported([*words, "--out", str(tmp_path / "int8")], capsys)
    found = answer["quantization"]
    assert (status, found["no_worse"], found["num_questions"]) == (0, True, 60)
    assert found["accuracy"] | {"low": 0, "high": 0} == {"a": 1.0, "b": 1.0, "low": 0, "high": 0}
    before, after = found["original"], found["export"]
    assert before["num_bytes"] == (run.model / "model.safetensors").stat().st_size
    assert after["num_bytes"] == (tmp_path / "int8" / "model.safetensors").stat().st_size
    assert after["num_bytes"] < before["num_bytes"]
    assert 1 <= before["perplexity"] < after["perplexity"] < 1.1 * before["perplexity"]
    assert before["tokens_per_second"] > 0
    record = json.loads((tmp_path / "int8" / measure.RECORD).read_text())
    assert record == found
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_a_bad_export_is_called_worse_and_refused(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: one layer's scales are a thousand times what they should be."""

    def spoilt(source: Path, folder: Path, *rest: Any) -> Any:
        made = quantize(source, folder, *rest)
        tensors = load_file(folder / "model.safetensors")
        tensors[DOWN] *= 1000
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return made

    monkeypatch.setattr(measure, "quantize", spoilt)
    words = [str(run.path), "--quantize", "int8", "--out"]
    assert export.main([*words, str(tmp_path / "one")]) == 1
    assert "\nworse by 100.0% of the questions [" in capsys.readouterr().out
    assert (tmp_path / "one" / "config.json").is_file()
    assert export.main([*words, str(tmp_path / "other"), "--accept-worse", "--num-questions", "20"]) == 0
    assert "\nworse by 100.0% of the questions [" in capsys.readouterr().out


def test_too_few_questions_show_nothing(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder, with the questions of a run."""
    words = [str(run.model), "--task-of", str(run.path), "--quantize", "w4a16", "--num-questions", "10"]
    assert export.main([*words, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert re.search(r"^  accuracy +1\.000 +1\.000 ", said, re.MULTILINE)
    assert "not shown to be no worse: +0.0% of the questions" in said
    with pytest.raises(UsageError, match=r"evaluate\.num_items is 500, but task file has no more than"):
        export.main([*words[:-1], "500", "--out", str(tmp_path / "more")])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_test_files_are_asked_where_the_run_has_some(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Calibrated on the training part of its task nevertheless."""
    (tmp_path / "test.jsonl").write_text(
        '{"question": "9-2=", "answer": "7"}\n{"question": "4+4=", "answer": "8"}'
    )
    config = load.read(run.config)
    other = RunDir(tmp_path / "runs" / "tested")
    other.create()
    asked = replace(config.evaluate, num_items=None, path=str(tmp_path / "test.jsonl"))
    load.save(replace(config, evaluate=asked), other.config)
    words = [str(run.model), "--task-of", str(other.path), "--quantize", "int8", "--calibrate", "4"]
    _, answer = exported([*words, "--out", str(tmp_path / "out")], capsys)
    assert answer["quantization"]["num_questions"] == 2
    assert answer["quantization"]["accuracy"]["a"] == 0.5
    assert answer["quantization"]["num_texts"] == 4


def test_unmeasured_says_so(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export.main([str(run.model), "--quantize", "int8", "--out", str(out), "--unmeasured"]) == 0
    assert "not measured" in capsys.readouterr().out
    assert load_file(out / "model.safetensors")[DOWN].shape == (32, 1)


def test_it_is_talked_to_and_evaluated_but_not_trained(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export.main([str(run.model), "--quantize", "int8", "--out", str(out), "--unmeasured"]) == 0
    capsys.readouterr()
    assert chat.main([str(out), "--ask", "15-8=", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == "7"
    own = ["model.config={}", f"model.path={out}", "model.tokenizer=null"]
    with pytest.raises(ConfigError, match="holds integer weights, which cannot be trained"):
        submit(["jobs/rl_smoke.yaml", *own, "--dry-run", "--run-root", str(tmp_path / "runs")])
    of_stage = ["stage=evaluate", "evaluate.num_items=8", "resources.ranks_per_node=1"]
    by_vllm = [*own, *of_stage, "rollout.engine=vllm"]
    with pytest.raises(ConfigError, match=r"take rollout.engine=sampler, or let vLLM read the folder itself"):
        submit(["jobs/rl_smoke.yaml", *by_vllm, "--dry-run", "--run-root", str(tmp_path / "runs")])
    asked = runs.submit(tmp_path / "runs", "asked", *own, *of_stage, job="jobs/rl_smoke.yaml").run
    runs.wait_over(asked)
    assert json.loads(asked.evaluation.read_text())["num_items"] == 8


def test_a_checkpoint_becomes_the_integers_of_the_model_that_the_run_ends_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a model that is never right is not called no worse."""
    shape = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    words = [f"model.config={json.dumps(shape)}", "train.num_steps=1", "evaluate.num_items=8"]
    trained = runs.submit(tmp_path / "runs", "a", *words, job="jobs/rl_smoke.yaml").run
    runs.wait_over(trained)
    step = [str(trained.path), "--step", "1", "--quantize", "int8", "--out", str(tmp_path / "step")]
    status, answer = exported(step, capsys)
    assert (status, answer["step"], answer["quantization"]["num_questions"]) == (1, 1, 8)
    assert "where a loss of 2.0% would not show" in answer["quantization"]["verdict"]
    end = [str(trained.path), "--quantize", "int8", "--out", str(tmp_path / "end"), "--unmeasured"]
    assert exported(end, capsys)[0] == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "step" / name).read_bytes() == (tmp_path / "end" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end", "runs", "step"]


def test_what_is_asked_wrongly_is_named(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path / "out")]
    for words, what in (
        (["--calibrate"], "--calibrate is of a quantised export"),
        (["--unmeasured"], "--unmeasured is of a quantised export"),
        (["--quantize", "int8", "--unmeasured", "--margin", "0.1"], "--margin needs the questions of a run"),
        (
            ["--quantize", "w4a16", "--calibrate"],
            "GPTQ for w4a16 is in r1hpc's sources",
        ),
        (["--quantize", "int8", "--calibrate", "0"], "--calibrate 0: give 1 or more"),
        (["--quantize", "int8", "--margin", "2"], r"--margin 2\.0: give a share"),
    ):
        with pytest.raises(UsageError, match=what):
            export.main([str(run.path), *out, *words])
    with pytest.raises(UsageError, match="name one by --task-of RUN"):
        export.main([str(run.model), *out, "--quantize", "int8"])
    pretrained = RunDir(tmp_path / "pretrained")
    pretrained.create()
    load.save(RunConfig(), pretrained.config)
    with pytest.raises(UsageError, match="of stage pretrain and has no task to measure on"):
        export.main([str(run.model), *out, "--quantize", "int8", "--task-of", str(pretrained.path)])
    load.save(load.load(None, ["stage=sft", "data.traces=[mine.jsonl]"]), pretrained.config)
    with pytest.raises(UsageError, match="of stage sft and has no task to measure on"):
        export.main([str(run.model), *out, "--quantize", "int8", "--task-of", str(pretrained.path)])
    with pytest.raises(UsageError, match=r"make a folder of it first, by export .*a\.gguf"):
        export.main([str(tmp_path / "a.gguf"), *out, "--quantize", "int8"])
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(R1hpcError, match=r"pip install 'r1hpc\[quantize\]'"):
        export.main([str(run.path), *out, "--quantize", "int8"])
    assert not (tmp_path / "out").exists()
