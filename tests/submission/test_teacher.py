"""The teacher of on-policy distillation at submission: what cannot teach is refused in words, what can is
counted, and in a chain it may be a stage that has not run yet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.paths import with_absolute_paths
from r1hpc.config.schema.rl import EvaluateConfig, RlConfig, TaskConfig
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.slurm.script import binds_of
from r1hpc.submit import main as submit
from tests.teachers import DISTILL, NUM_PARAMETERS, write_teacher

_HERE = ("--executor", "local", "--dry-run", "--json")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("models") / "teacher")


def planned(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> dict[str, Any]:
    assert submit(["jobs/rl_smoke.yaml", *_HERE, "--run-root", str(root), *words]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_teacher_is_counted(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, tmp_path, *DISTILL, f"rl.teacher={teacher}")["plan"]
    assert made["teacher_parameters"] == NUM_PARAMETERS
    assert made["memory"]["reference_gib"] * 2**30 == pytest.approx(4 * NUM_PARAMETERS)
    without = planned(capsys, tmp_path)["plan"]
    assert without["teacher_parameters"] is None
    assert made["memory"]["logits_gib"] > without["memory"]["logits_gib"]


def test_adapters_of_the_student_leave_the_teacher_where_it_is(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*DISTILL, f"rl.teacher={teacher}", "model.lora_rank=4")
    made = planned(capsys, tmp_path, *words)["plan"]
    assert made["memory"]["reference_gib"] * 2**30 == pytest.approx(4 * NUM_PARAMETERS)


def _edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _swap_two_digits(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_edit("tokenizer.json", _swap_two_digits), r"another vocabulary than the student: 2 of 27 tokens"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "rl.teacher, as a model.path of its own"),
        (lambda folder: (folder / "config.json").unlink(), "rl.teacher must be a folder in Hugging Face"),
        (
            _edit("config.json", lambda config: config.update(quantization_config={"bits": 4})),
            "integer weights",
        ),
    ],
    ids=["other tokens", "no tokens", "no weights", "no config", "integers"],
)
def test_what_cannot_teach_is_refused(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = write_teacher(tmp_path / "teacher")
    spoil(folder)
    with pytest.raises(UsageError, match=said):
        submit(["jobs/rl_smoke.yaml", *_HERE, *DISTILL, f"rl.teacher={folder}"])


def test_a_teacher_that_ends_otherwise_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_teacher(tmp_path / "teacher")
    words = (*DISTILL, f"rl.teacher={folder}")
    assert not any("ends an answer" in note for note in planned(capsys, tmp_path, *words)["notes"])
    _edit("tokenizer_config.json", lambda config: config.update(eos_token="7"))(folder)
    (said,) = [note for note in planned(capsys, tmp_path, *words)["notes"] if "ends an answer" in note]
    assert said.startswith("rl.teacher ends an answer with 7, and the student's completions go on")


@pytest.mark.parametrize(
    ("shape", "said"),
    [({"vocab_size": 20}, "20 rows for 27 tokens"), ({"n_positions": 8}, "rl.teacher has 8 positions")],
)
def test_a_teacher_too_small_for_its_tokens_is_refused(
    shape: dict[str, int], said: str, tmp_path: Path
) -> None:
    folder = write_teacher(tmp_path / "teacher", **shape)
    with pytest.raises(UsageError, match=said):
        submit(["jobs/rl_smoke.yaml", *_HERE, *DISTILL, f"rl.teacher={folder}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (DISTILL, "needs rl.teacher=DIR"),
        (("rl.teacher=somewhere",), "no use with rl.algorithm=grpo"),
        ((*DISTILL, "rl.teacher=nowhere"), "rl.teacher .*nowhere is not a folder"),
        ((*DISTILL, "rl.teacher=Qwen/Nowhere-7B"), "rl.teacher Qwen/Nowhere-7B: .*hf download"),
        ((*DISTILL, "rl.teacher=x", "rl.kl_coef=0.1"), "rl.kl_coef=0.1 has no use"),
        ((*DISTILL, "rl.teacher=x", "rl.max_resamples=1"), "rl.max_resamples=1 has no use"),
        ((*DISTILL, "rl.teacher=x", "rl.ratio=sequence"), "rl.ratio=sequence has no use"),
        (("rl.algorithm=ppo", "rl.baseline=leave_one_out"), "rl.baseline=leave_one_out has no use with PPO"),
        ((*DISTILL, "rl.teacher=x", "rl.importance_sampling=truncated"), "importance_sampling=truncated"),
        ((*DISTILL, "rl.teacher=x", "rl.importance_mask=trust"), "importance_mask=trust has no use"),
        (("rl.importance_mask=ratio",), "importance_mask=ratio has no use.*Add rl.importance_sampling"),
        (("rl.importance_level=sequence",), "importance_level=sequence has no use"),
        (
            ("rl.max_staleness=2", "rl.importance_sampling=none"),
            "max_staleness=2 with rl.importance_sampling=none .*Take rl.importance_sampling=truncated",
        ),
        (("rl.max_staleness=1", "rl.algorithm=ppo"), "no correction in PPO.*Take rl.algorithm=grpo"),
        ((*DISTILL, "rl.teacher=x", "rl.jsd_beta=1.5"), "rl.jsd_beta"),
    ],
)
def test_settings_that_say_nothing_are_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        submit(["jobs/rl_smoke.yaml", *_HERE, *words])


def test_the_nodes_find_it(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an absolute path, in a container too."""
    monkeypatch.chdir(teacher.parent)
    made = with_absolute_paths(RunConfig(stage="rl", rl=RlConfig(algorithm="distill", teacher="teacher")))
    assert made.rl.teacher == str(teacher)
    assert str(teacher) in binds_of(made, Path("/runs"))


def test_the_nodes_find_the_questions_and_what_a_model_is_linked_to(tmp_path: Path) -> None:
    """In a container only what is bound is there. The Hub's cache keeps files elsewhere than its snapshot."""
    for folder in ("questions", "tests", "told", "snapshot", "blobs"):
        (tmp_path / folder).mkdir()
    for file in ("questions/train.jsonl", "tests/a.jsonl", "told/b.jsonl", "blobs/0a1b"):
        (tmp_path / file).touch()
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/0a1b")
    config = RunConfig(
        stage="rl",
        model=ModelConfig(path=str(tmp_path / "snapshot"), config={}),
        task=TaskConfig(name="file", options={"path": str(tmp_path / "questions/train.jsonl")}),
        evaluate=EvaluateConfig(
            path=str(tmp_path / "tests"), num_items=1, trained_on=[str(tmp_path / "told/*.jsonl")]
        ),
    )
    found = {Path(each).name for each in binds_of(config, Path("/runs"))}
    assert found >= {"runs", "snapshot", "blobs", "questions", "tests", "told"}


def test_in_a_chain_the_teacher_may_be_yet_to_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(["jobs/distill.yaml", *_HERE, "--run-root", str(tmp_path)]) == 0
    stages = {each["stage"]: each for each in json.loads(capsys.readouterr().out)["stages"]}
    teacher, student = stages["teacher"]["plan"], stages["distilled"]["plan"]
    assert student["teacher_parameters"] == teacher["num_parameters"]
    assert student["num_parameters"] < teacher["num_parameters"]
    assert {"student", "teacher"} == set(stages["distilled"]["needs"])
