"""How much of a test file stands in what a model was trained on, in whatever form that lies there."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.reasoning import EvaluateConfig
from r1hpc.config.schema import RunConfig
from r1hpc.tasks.benchmark import with_counted_sets
from r1hpc.train.contamination import check_training_files, contamination

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
    check_training_files(config)
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
    (folder / "more.jsonl").write_text(json.dumps({"text": _QUESTIONS[3]}) + "\n")
    assert _found(asked, folder) == 2


def test_a_file_that_is_not_there_is_named(asked: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"evaluate.trained_on.*nowhere.parquet"):
        _found(asked, tmp_path / "nowhere.parquet")


def test_a_table_that_is_damaged_is_named_before_anything_is_asked(asked: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"cut.parquet cannot be read as parquet"):
        _found(asked, tmp_path / "cut.parquet")
