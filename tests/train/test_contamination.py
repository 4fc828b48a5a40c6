"""How much of a test file stands in what a model was trained on, in whatever form that lies there."""

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.rl import EvaluateConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.problems.benchmark import check_trained_on, with_counted_sets
from r1hpc.telemetry.records.evaluations import contamination_lines
from r1hpc.train.generate import generate
from r1hpc.train.generate.generate import contamination
from tests.train.test_evaluate import said

_QUESTIONS = [
    f"On his farm in {where} he has {n} red hens and {n} brown hens more; how many {n} times?"
    for where, n in (("Kent", "two"), ("Ohio", "six"), ("Bern", "ten"), ("Oslo", "nine"))
]


@pytest.fixture
def asked(tmp_path: Path) -> RunConfig:
    rows = [{"question": text, "answer": "1"} for text in _QUESTIONS]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate = EvaluateConfig(path=str(tmp_path / "test.jsonl"))
    return with_counted_sets(RunConfig(stage="evaluate", evaluate=evaluate))


def _found(asked: RunConfig, *trained_on: Path) -> int:
    config = replace(asked, evaluate=replace(asked.evaluate, trained_on=[str(path) for path in trained_on]))
    check_trained_on(config)
    report = contamination(config)
    assert report is not None
    (only,) = report.values()
    assert only["num_questions"] == len(_QUESTIONS)
    found: int = only["num_found"]
    return found


def test_it_is_found_in_lines_and_in_tables(asked: RunConfig, tmp_path: Path) -> None:
    lines, table, folder = tmp_path / "traces.jsonl", tmp_path / "train.parquet", tmp_path / "saved"
    lines.write_text(json.dumps({"prompt": _QUESTIONS[0], "completion": "28"}) + "\n")
    shown = pyarrow.table({"problem": [*_QUESTIONS[1:3], "Another one."], "solution": ["1", "2", "3"]})
    pyarrow.parquet.write_table(shown, table)
    folder.mkdir()
    with pyarrow.ipc.new_stream(folder / "data-00000.arrow", shown.schema) as writer:
        writer.write_table(shown.slice(1))
    assert _found(asked, lines) == 1
    assert _found(asked, table) == 2
    assert _found(asked, folder) == 1
    assert _found(asked, lines, table, folder) == 3
    assert _found(asked, tmp_path / "tr*.parquet") == 2
    assert _found(asked, tmp_path / "trac*.jsonl") == 1
    (folder / "more.jsonl").write_text(json.dumps({"text": _QUESTIONS[3]}) + "\n")
    assert _found(asked, folder) == 2


def test_a_stop_during_the_search_leaves_the_figures_and_says_what_was_not_searched(
    asked: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, run = tmp_path / "traces.jsonl", RunDir(tmp_path / "run")
    lines.write_text(json.dumps({"prompt": _QUESTIONS[0], "completion": "28"}) + "\n")
    evaluate = replace(asked.evaluate, trained_on=[str(lines)], not_searched=["its pretraining"])
    run.create()
    stop = [True]
    job: Any = SimpleNamespace(
        config=replace(asked, evaluate=evaluate),
        run=run,
        watchdog=SimpleNamespace(beat=lambda phase: None),
        requests=SimpleNamespace(poll=lambda: (stop[0], False)),
    )
    answers = [asdict(said(number, [("1", True)])) for number in range(len(_QUESTIONS))]
    monkeypatch.setattr(generate, "_read_parts", lambda job: answers)
    assert not generate._sum_up(job, "test")
    left = json.loads(run.evaluation.read_text())
    assert left["greedy"]["value"] == 1
    assert "contamination" not in left
    assert left["not_searched"] == ["its pretraining", str(lines)]
    stop[0] = False
    assert generate._sum_up(job, "test")
    found = json.loads(run.evaluation.read_text())
    (only,) = found["contamination"].values()
    assert only["num_found"] == 1
    assert found["not_searched"] == ["its pretraining"]


def test_a_file_that_is_not_there_is_named(asked: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"evaluate.trained_on.*nowhere.parquet"):
        _found(asked, tmp_path / "nowhere.parquet")


def test_a_table_that_is_damaged_is_named_before_anything_is_asked(asked: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"cut.parquet cannot be read as parquet"):
        _found(asked, tmp_path / "cut.parquet")


def test_a_damaged_file_of_lines_has_not_been_searched(asked: RunConfig, tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"text": text * 900}) + "\n" for text in _QUESTIONS).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    damaged: list[str] = []
    evaluate = replace(asked.evaluate, trained_on=[str(tmp_path / "cut.jsonl.gz")])
    assert contamination(replace(asked, evaluate=evaluate), not_read=damaged.append) is not None
    (said,) = damaged
    assert said.startswith(f"{tmp_path}/cut.jsonl.gz at byte ")


def test_a_folder_of_nothing_is_named(asked: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty holds no \*.jsonl"):
        _found(asked, tmp_path / "empty")


def test_what_is_yet_to_come_is_not_looked_for(asked: RunConfig, tmp_path: Path) -> None:
    trained_on = [str(tmp_path / "chain" / "traces" / "traces.jsonl")]
    config = replace(asked, evaluate=replace(asked.evaluate, trained_on=trained_on))
    check_trained_on(config, [tmp_path / "chain" / "traces"])
    with pytest.raises(UsageError, match=r"traces.jsonl is not there"):
        check_trained_on(config, [tmp_path / "chain" / "sft"])


@pytest.mark.parametrize("stage", ["rl", "evaluate"])
@pytest.mark.parametrize("key", ["trained_on", "not_searched"])
def test_where_nothing_is_reported_of_it_it_is_refused(tmp_path: Path, stage: str, key: str) -> None:
    given: dict[str, Any] = {key: [str(tmp_path)]}
    evaluate = EvaluateConfig(**given)
    with pytest.raises(UsageError, match=rf"evaluate.{key} is for stage evaluate with evaluate.path"):
        check_trained_on(RunConfig(stage=stage, evaluate=evaluate))
    check_trained_on(RunConfig(stage="sft", evaluate=evaluate))


def test_of_multiple_choice_the_question_alone_is_looked_for(tmp_path: Path) -> None:
    """Its choices stand in another layout elsewhere, and below 8 words it cannot be found."""
    long = "Which of the four planets below is the one with the most moons"
    rows = [
        {"question": question, "choices": ["Mars", "Saturn the sixth of all", "Venus", "Earth"], "answer": 1}
        for question in (f"{long}?", "Which planet has rings?")
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {
        "text": f"{long}? (1) Mars (2) Saturn. Which planet has rings? (a) Mars (b) Saturn the sixth of all"
    }
    (tmp_path / "seen.jsonl").write_text(json.dumps(seen) + "\n")
    evaluate = EvaluateConfig(path=str(tmp_path / "test.jsonl"), trained_on=[str(tmp_path / "seen.jsonl")])
    config = RunConfig(stage="evaluate", task=TaskConfig(choices="choices"), evaluate=evaluate)
    report = contamination(with_counted_sets(config))
    assert report is not None
    counts = {name: report["test"][name] for name in ("num_questions", "num_found", "num_too_short")}
    assert counts == {"num_questions": 1, "num_found": 1, "num_too_short": 1}


def test_the_report_names_what_was_not_searched() -> None:
    left_out = {"not_searched": ["data.path=/data/shards (stage sft)"]}
    (said,) = contamination_lines(left_out)
    assert said == "not searched for test questions, though trained on: data.path=/data/shards (stage sft)"
    found = {"num_found": 0, "num_questions": 4, "num_too_short": 0, "ngram": 13}
    first, last = contamination_lines({"contamination": {"test": found}, **left_out})
    assert first.startswith("test: 0 of 4 questions are in the training data")
    assert last == said
