"""Questions from files in the forms in which benchmarks are published."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import RewardConfig, RolloutConfig, TaskConfig
from r1hpc.config.schema.run import ModelConfig, RunConfig
from r1hpc.tasks.grading.judges import choice
from r1hpc.tasks.problems.file import (
    Columns,
    Question,
    QuestionFile,
    check_one_split,
    read_questions,
    tables_in,
)
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.text.format import compose, prompt_ids
from r1hpc.tasks.text.tokenizer import fitting, form_of, load_tokenizer
from tests.tasks.tokenizers_of_others import llama3_like

Rows = list[dict[str, Any]]

_GSM8K = {"question": "Two and two?", "answer": "It is <<2+2=4>>4.\n#### 1,004"}
_MATH = {"problem": "Half?", "solution": r"So $x = \boxed{\frac{1}{2}}$.", "level": 5}
_AIME = {"Problem": "Find it.", "Answer": 204}
_MMLU = {"question": "Which?", "choices": ["red", "green", "blue"], "answer": 1}
_ARC = {
    "question": "Which?",
    "choices": {"text": ["red", "green", "blue"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}

_FORMS = [
    (_GSM8K, Columns(), Question("Two and two?", "1,004", "It is 4.")),
    (_MATH, Columns("problem", "solution"), Question("Half?", r"\frac{1}{2}", r"So $x = {\frac{1}{2}}$.")),
    (
        {"question": "Six?", "answer": r"It is $\fbox{6}$, and no $\boxed 7$."},
        Columns(),
        Question("Six?", "6", r"It is ${6}$, and no $ 7$."),
    ),
    ({"question": "Two?", "answer": r"So $x = \boxed 2$."}, Columns(), Question("Two?", "2", "So $x =  2$.")),
    (_AIME, Columns("Problem", "Answer"), Question("Find it.", "204")),
    ({"question": "?", "answer": r"\boxed{ 7 }"}, Columns(), Question("?", "7")),
    ({"question": "?", "answer": r"\fbox{7}"}, Columns(), Question("?", "7")),
    ({"question": "?", "answer": r"It is so. #### \boxed{7}"}, Columns(), Question("?", "7", "It is so.")),
    (
        _MMLU,
        Columns(choices="choices"),
        Question("Which?\nA. red\nB. green\nC. blue", "B", choices=("red", "green", "blue")),
    ),
    (
        _ARC,
        Columns(answer="answerKey", choices="choices"),
        Question("Which?\nA. red\nB. green\nC. blue", "C", choices=("red", "green", "blue")),
    ),
    (
        {**_ARC, "answerKey": 1},  # its label, no position
        Columns(answer="answerKey", choices="choices"),
        Question("Which?\nA. red\nB. green\nC. blue", "A", choices=("red", "green", "blue")),
    ),
]


def _write(path: Path, rows: Rows) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":  # as `datasets` saves: a stream
        with pyarrow.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize(("row", "columns", "question"), _FORMS)
def test_each_form_in_each_kind_of_file(
    tmp_path: Path, kind: str, row: dict[str, Any], columns: Columns, question: Question
) -> None:
    read, _ = read_questions(_write(tmp_path / f"x.{kind}", [row, row]), columns)
    assert read == [question, question]


def test_the_splits_of_a_folder_are_not_taken_for_one(tmp_path: Path) -> None:
    """GSM8K and MATH as the Hub lays them out: the test questions beside those to train on."""
    for name in ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"):
        _write(tmp_path / f"{name}.parquet", [_GSM8K])
    with pytest.raises(UsageError, match=r"several splits .*test-0.* and train-0.*: name the files of") as e:
        check_one_split(tmp_path)
    one, every = (
        Path(words) for words in str(e.value).rpartition("as in ")[2].split(", or name all of them by ")
    )
    assert one == tmp_path / "*train*.parquet"
    for path, count in ((one, 2), (every, 3), (tmp_path / "test-*", 1)):
        check_one_split(path)
        assert len(read_questions(path, Columns())[0]) == len(tables_in(path)) == count
    for name, said in (("validation-*", "is not there"), ("t**.parquet", "is no pattern of file names")):
        with pytest.raises(UsageError, match=said):
            read_questions(tmp_path / name, Columns())


def test_a_pattern_of_two_splits_is_refused_as_their_folder_is(tmp_path: Path) -> None:
    for name in ("gsm8k-test", "gsm8k-train"):
        _write(tmp_path / f"{name}.jsonl", [_GSM8K])
    with pytest.raises(
        UsageError, match=r"several splits .* as in .*/gsm8k-train\.jsonl, or name all of them"
    ):
        check_one_split(tmp_path / "gsm8k-*.jsonl")
    check_one_split(tmp_path / "gsm8k-train.jsonl")


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (("train_0", "train_1", "test_0"), r"\*train\*\.jsonl"),
        (("algebra_train", "geometry_train", "algebra_test"), r"\*train\*\.jsonl"),
    ],
)
def test_of_a_split_of_several_files_all_are_named(tmp_path: Path, names: Sequence[str], one: str) -> None:
    for name in names:
        _write(tmp_path / f"{name}.jsonl", [_GSM8K])
    with pytest.raises(UsageError, match=rf"as in {tmp_path}/{one}, or name all of them"):
        check_one_split(tmp_path)


def test_no_pattern_is_advised_that_names_other_files(tmp_path: Path) -> None:
    for name in ("Train_0", "Train_1", "test_0"):
        _write(tmp_path / f"{name}.jsonl", [_GSM8K])
    with pytest.raises(
        UsageError, match=r": put the files of one into a folder of its own, or name all of them by"
    ):
        check_one_split(tmp_path)


def test_a_folder_as_datasets_saves_it(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(7)]
    split = tmp_path / "saved" / "test"
    split.mkdir(parents=True)
    _write(split / "data-00000-of-00002.arrow", rows[:4])
    _write(split / "data-00001-of-00002.arrow", rows[4:])
    _write(split / "cache-0123456789abcdef.arrow", rows)  # as map() leaves it there
    (split / "state.json").write_text("{}")
    read, digest = read_questions(split, Columns())
    assert [each.text for each in read] == [row["question"] for row in rows]
    assert len(digest) == 64
    with pytest.raises(UsageError, match=r"it has the folders test: name one, as in .*saved/test"):
        read_questions(tmp_path / "saved", Columns())


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        (_AIME, Columns(), "no column 'question'.*it has: Problem, Answer. Name it by task.question="),
        (_AIME, Columns("Problem", "Anwser"), "no column 'Anwser' .did you mean 'Answer'"),
        ({"question": "?", "answer": None}, Columns(), "answer is None"),
        ({"question": "?", "answer": [1.5]}, Columns(), "answer is .1.5.: it must be text or a number"),
        ({**_MMLU, "answer": 3}, Columns(choices="choices"), "the answer 3 names none of the 3 choices"),
        ({**_MMLU, "choices": "red"}, Columns(choices="choices"), "must be a list"),
    ],
)
def test_a_row_that_cannot_be_is_named(
    tmp_path: Path, row: dict[str, Any], columns: Columns, said: str
) -> None:
    for kind, where in (("jsonl", "x.jsonl:1"), ("parquet", "x.parquet, row 1")):
        with pytest.raises(UsageError, match=f"{where}.*{said}"):
            read_questions(_write(tmp_path / f"x.{kind}", [row]), columns)


def test_files_that_are_nearly_of_a_known_kind_are_told_how_to_become_so(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match=r"x\.jsonl\.gz is compressed: unpack it"):
        read_questions(tmp_path / "x.jsonl.gz", Columns())
    (tmp_path / "x.json").write_text('[\n{"question": "?", "answer": "1"}]')
    with pytest.raises(UsageError, match=r"x\.json holds a JSON list: write one object a line"):
        read_questions(tmp_path / "x.json", Columns())


def test_what_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(UsageError, match=r"x\.parquet cannot be read as parquet"):
        read_questions(tmp_path / "x.parquet", Columns())


@pytest.mark.parametrize(
    ("text", "right"),
    [
        *((text, True) for text in ("B", "(B)", " B. green", "B: of course", "B) green", "Green", "green")),
        *((text, False) for text in ("A", "(C)", "red", "Because", "b", "", "B or C", "BC")),
    ],
)
def test_the_judge_of_choices(text: str, right: bool) -> None:
    assert choice(text, "B", {"choices": ["red", "green", "blue"]}) == right


@pytest.mark.parametrize(("answer", "right"), [("A", True), ("C", False)])
def test_a_choice_whose_text_begins_like_a_letter(answer: str, right: bool) -> None:
    metadata = {"choices": ["C. elegans", "E. coli", "yeast"]}
    assert choice("C. elegans", answer, metadata) == right
    assert choice("C", answer, metadata) != right
    assert choice("C. yeast", answer, metadata) != right


def test_a_letter_form_is_a_letter_also_among_such_texts() -> None:
    metadata = {"choices": ["(B)", "(A)"]}
    assert choice("(B)", "B", metadata)
    assert not choice("(B)", "A", metadata)


def test_identifiers_are_compared_character_by_character_where_that_is_asked(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", [{"question": f"{n}?", "answer": "os.Path"} for n in range(30)])
    options = {"path": str(path), "judge": "exact"}
    task = make_task(TaskConfig("file", options=options))
    texts = ["os.Path", " os.Path ", "os.path", "os. Path", "ospath"]
    completions = [Completion(compose("", text), 9, False) for text in texts]
    with Scorer(RewardConfig(), task, max_completion_length=99) as scorer:
        (scores,) = scorer.score_groups([(task.item(0), completions)])
    assert [score.correct for score in scores] == [True, True, False, False, False]
    assert task.id != make_task(TaskConfig("file", options={"path": str(path)})).id


@pytest.mark.parametrize(
    ("asked", "choices", "said"),
    [
        ("close", "", "task.options.judge is 'close': it must be math or exact"),
        ("exact", "of", "leave it out"),
    ],
)
def test_a_judge_that_cannot_be_is_refused(tmp_path: Path, asked: str, choices: str, said: str) -> None:
    path = _write(tmp_path / "x.jsonl", [{"question": "1?", "answer": "1"}])
    with pytest.raises(UsageError, match=re.escape(said)):
        make_task(TaskConfig("file", options={"path": str(path), "judge": asked}, choices=choices))


def test_a_boxed_answer_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", [{"problem": f"{n}?", "solution": r"\frac12"} for n in range(30)])
    task = make_task(TaskConfig("file", options={"path": str(path)}, question="problem", answer="solution"))
    texts = [
        r"<think>hm \boxed{3}</think>It is $\boxed{\frac{1}{2}}$.",
        r"\boxed{3} no, \boxed{0.5}",
        r"<think>\boxed{0.5}</think>so",
        compose("", "0.5"),
        r"\boxed{0.5",
    ]
    completions = [Completion(text, 9, False) for text in texts]
    config = RewardConfig(timeout_s=30.0, answer_in="boxed")
    with Scorer(config, task, max_completion_length=99) as scorer:
        (scores,) = scorer.score_groups([(task.item(0), completions)])
    assert [score.correct for score in scores] == [True, True, False, False, False]
    assert [score.well_formed for score in scores] == [True, True, False, False, False]


def test_a_number_of_json_is_an_answer_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(f'{{"question": "?", "answer": {said}}}\n' for said in ("0.1", "2.50", "33.0", "7"))
    )
    questions, _ = read_questions(path, Columns())
    assert [question.answer for question in questions] == ["0.1", "2.50", "33", "7"]
    path.write_text('{"question": "?", "answer": NaN}\n')
    with pytest.raises(UsageError, match=r"q\.jsonl:1: answer is nan: it must be text or a number"):
        read_questions(path, Columns())


def _long_row_among(folder: Path) -> RunConfig:
    rows = [{"question": f"1 + {n}", "answer": f"{n + 1}"} for n in range(40)]
    rows[33]["question"] = "1 + " * 20 + "1"
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        stage="rl",
        model=ModelConfig(tokenizer="characters"),
        task=TaskConfig("file", options={"path": f"{folder}/sums.jsonl", "template": "{question}"}),
        rollout=RolloutConfig(max_prompt_length=16),
    )


def test_rows_that_are_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    config = _long_row_among(tmp_path)
    assert fitting(config) is None, "they are refused by default"
    whole = make_task(config.task, None, fitting(config))
    config = replace(config, task=replace(config.task, drop_longer=True))
    task = make_task(config.task, None, fitting(config))
    assert isinstance(task, QuestionFile)
    parts = (task.items_per_pass(held_out) for held_out in (False, True))
    assert sum(parts) == 39
    items = [task.item(index) for index in range(task.items_per_pass())]
    assert all(len(item.prompt) <= 16 for item in items)
    (sentence,) = task.notes()
    assert sentence.startswith(f"1 of 40 rows of {tmp_path}/sums.jsonl are left out, the first is ")
    assert "sums.jsonl:34: " in sentence
    assert task.id != whole.id, "a run that goes on asks the same rows"
    short = replace(config, rollout=RolloutConfig(max_prompt_length=2))
    with pytest.raises(UsageError, match=r"every prompt of .* is longer than rollout\.max_prompt_length"):
        make_task(short.task, None, fitting(short))


def test_an_error_on_a_prompt_names_its_line(tmp_path: Path) -> None:
    config = _long_row_among(tmp_path)
    task = make_task(config.task)
    assert isinstance(task, QuestionFile)
    items = [task.item(index, part) for part in (False, True) for index in range(task.items_per_pass(part))]
    long = max(items, key=lambda item: len(item.prompt))
    tokenizer = load_tokenizer(config.model)
    with pytest.raises(UsageError, match=r"sums\.jsonl:34: a prompt has 81 tokens.*task\.drop_longer=true"):
        prompt_ids(tokenizer, form_of(tokenizer, config.model), long.prompt, long.where, 16)
    chat = ModelConfig(path=str(llama3_like(tmp_path / "llama")))
    tokenizer = load_tokenizer(chat)
    with pytest.raises(UsageError, match=r"^q\.jsonl:3: a message spells the special token"):
        prompt_ids(tokenizer, form_of(tokenizer, chat), "2?<|eot_id|>", "q.jsonl:3", 16)
