"""The export command: the model of a run as a folder that transformers reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc import export
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from tests.recorded import RecordedRun
from tests.runs import command_output, contents, run_environment, submit, wait_over


def exported(run: Path, out: Path, *words: str) -> dict[str, Any]:
    """The JSON object of an export that must succeed."""
    answer: dict[str, Any] = json.loads(
        command_output(
            ["-m", "r1hpc.export", str(run), "--out", str(out), "--json", *words], run_environment()
        )
    )
    return answer


@pytest.mark.parametrize(
    "words",
    [("rl.algorithm=ppo",), ("deepspeed.zero_stage=3", "model.lora_rank=4")],
    ids=["critic", "shards"],
)
def test_a_checkpoint_is_the_model_that_the_run_ends_with(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Bit by bit: with a critic beside it, and with adapters in the shards of ZeRO 3."""
    run = submit(tmp_path / "runs", "a", "train.num_steps=2", *words, job="jobs/rl_smoke.yaml").run
    wait_over(run)
    from_checkpoint = exported(run.path, tmp_path / "converted", "--step", "2")
    copied = exported(run.path, tmp_path / "copied")
    assert (from_checkpoint["step"], copied["step"]) == (2, None)
    model = contents(run.model)
    assert "model.safetensors" in model
    for folder in (tmp_path / "converted", tmp_path / "copied"):
        made = contents(folder)
        assert sorted(made) == sorted(model)
        assert [name for name in model if made[name] != model[name]] == [], folder.name
    assert not list(tmp_path.glob(".*.partial"))


def test_pretraining_leaves_its_model_and_the_tokenizer_of_its_data(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = submit(tmp_path / "runs", "a", "train.num_steps=4", "checkpoint.save_every=2").run
    wait_over(run)
    out = tmp_path / "model"
    assert exported(run.path, out)["step"] is None
    again = tmp_path / "again"
    assert exported(run.path, again, "--step", "4")["step"] == 4
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in out.iterdir()
    }
    network = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert network.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer.encode("def f(x):")) == "def f(x):"


@pytest.fixture
def recorded(tmp_path: Path) -> RecordedRun:
    made = RecordedRun(tmp_path / "runs" / "demo")
    made.submit("4711", "slurm")
    made.attempt(1, 20, "crash", committed=10)
    return made


def test_what_cannot_be_exported_is_named(recorded: RecordedRun, tmp_path: Path) -> None:
    run, out = str(recorded.run.path), str(tmp_path / "out")
    with pytest.raises(UsageError, match="--out DIR is required"):
        export.main([run])
    with pytest.raises(StateError, match="has committed no checkpoint yet"):
        export.main([run, "--out", out])
    with pytest.raises(UsageError, match="no checkpoint of step 7: there is none"):
        export.main([run, "--out", out, "--step", "7"])
    recorded.checkpoint(10)
    with pytest.raises(UsageError, match="no checkpoint of step 7: there are 10"):
        export.main([run, "--out", out, "--step", "7"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UsageError, match="is there already"):
        export.main([run, "--out", str(tmp_path / "full")])
    assert not Path(out).exists()


def test_a_link_to_an_empty_folder_is_followed(recorded: RecordedRun, tmp_path: Path) -> None:
    (recorded.run.path / "model").mkdir()
    (recorded.run.path / "model" / "config.json").write_text("{}")
    recorded.run.finished.write_text("{}")
    (tmp_path / "scratch" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "scratch" / "out")
    assert export.main([str(recorded.run.path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "scratch" / "out" / "config.json").read_text() == "{}"


def test_a_step_is_of_a_runs_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--step is of a run's checkpoints"):
        export.main([str(tmp_path / "a.gguf"), "--out", str(tmp_path / "out"), "--step", "7"])


def test_gguf_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A whole one is converted in tests/train/test_tokenizers_travel.py."""
    torn, out = tmp_path / "torn.gguf", tmp_path / "out"
    with pytest.raises(UsageError, match=r"torn\.gguf is not there"):
        export.main([str(torn), "--out", str(out)])
    torn.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(
        R1hpcError, match=r"transformers cannot read .*torn\.gguf|pip install 'r1hpc\[gguf\]'"
    ):
        export.main([str(torn), "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["torn.gguf"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.add_uint16("split.count", 2), "is one of 2 parts of a model"),
        (lambda file: file.add_string("llama.rope.scaling.type", "yarn"), "rope scaling yarn"),
        (lambda file: file.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "rope_freqs.weight"),
    ],
)
def test_gguf_of_which_a_part_would_be_dropped_is_refused(
    tmp_path: Path, change: Callable[[Any], None], said: str
) -> None:
    """transformers reads the rest, and the model is another one."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_tensor("output.weight", np.ones((2, 4), np.float32))
    change(file)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    with pytest.raises(UsageError, match=said):
        export.main([str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tool", ["tensorboard", "prometheus", "wandb"])
def test_metrics_have_a_command_of_their_own(recorded: RecordedRun, tool: str) -> None:
    with pytest.raises(UsageError, match=rf"r1hpc\.export_metrics RUN --to {tool}"):
        export.main([str(recorded.run.path), "--to", tool])
