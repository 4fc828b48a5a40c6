"""A user's own task and reward: they work as ours do, and whatever goes wrong in them is one sentence."""

import itertools
import json
from pathlib import Path

import pytest

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.config.schema.rl import GenerateConfig, RewardConfig, TaskConfig
from r1hpc.config.schema.run import RunConfig
from r1hpc.tasks.grading import verifier
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Task, is_held_out
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.sandbox import process
from r1hpc.tasks.text.format import compose
from r1hpc.tasks.try_out import check_questions
from tests.tasks.own_code import REWARD, TASK, write

_numbers = itertools.count()


def _task(folder: Path, text: str = TASK, name: str = "Doubling", seed: int = 0, **options: object) -> Task:
    path = write(folder, f"own_{next(_numbers)}.py", text)
    return make_task(TaskConfig(f"{path}:{name}", seed, options))


def _reward(folder: Path, text: str, timeout_s: float = 5.0) -> RewardConfig:
    path = write(folder, f"own_{next(_numbers)}.py", text)
    return RewardConfig(terms={"accuracy": 1.0, f"{path}:score": 0.5}, timeout_s=timeout_s)


def test_its_questions_are_a_function_of_seed_and_index(tmp_path: Path) -> None:
    task = _task(tmp_path, largest=10**6)
    again = _task(tmp_path, largest=10**6, seed=1)
    items = [task.item(index, held_out) for held_out in (False, True) for index in range(20)]
    assert items == [task.item(index, held_out) for held_out in (False, True) for index in range(20)]
    assert {is_held_out(item.prompt) for item in items[:20]} == {False}
    assert {is_held_out(item.prompt) for item in items[20:]} == {True}
    assert len({item.prompt for item in items}) == 40
    assert items[0].prompt != again.item(0).prompt
    assert task.num_questions() is None
    number = items[0].metadata["number"]
    assert task.demonstration(items[0], thinking=True) == compose(f"{number}+{number}", str(2 * number))


@pytest.mark.parametrize("size", ["", "def __len__(self): return 5"])
@pytest.mark.parametrize("draw", ["random.random()", "time.perf_counter()", "len(asked)"])
def test_questions_that_do_not_follow_from_their_index_are_refused(
    tmp_path: Path, size: str, draw: str
) -> None:
    text = f"""
        import random, time
        asked = []
        class Words:
            {size or "pass"}
            def question(self, index):
                asked.append(index)
                return f"say {{index}}", str({draw})
    """
    path = write(tmp_path, f"own_{next(_numbers)}.py", text)
    plain = GenerateConfig(thinking_share=0.0)
    config = RunConfig(stage="traces", task=TaskConfig(f"{path}:Words"), generate=plain)
    with pytest.raises(
        UsageError, match=r"question\(\d+\) is not a function of its index: .* it gave .* then "
    ):
        check_questions(config)
    path.write_text(path.read_text().replace(draw, "random.Random(index).random()"))
    assert check_questions(config)


def test_a_file_that_is_missing_is_looked_for_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = """
        class Words:
            def __init__(self, path): open(path)
            def question(self, index): return "1", "1"
    """
    with pytest.raises(UsageError, match=rf"No such file .*'no\.jsonl', looked for in {tmp_path}"):
        _task(tmp_path, text, "Words", path="no.jsonl")


def test_one_with_a_length_asks_every_question_once_a_pass(tmp_path: Path) -> None:
    text = """
        class Words:
            judge = "exact"
            def __len__(self): return 50
            def question(self, index): return f"say {index}", str(index)
    """
    task = _task(tmp_path, text, "Words")
    size = task.num_questions()
    assert size
    assert size + (task.num_questions(held_out=True) or 0) == 50
    first = [task.item(index).prompt for index in range(size)]
    assert len(set(first)) == size
    assert set(first) == {task.item(size + index).prompt for index in range(size)}
    assert task.judge == "exact"
    with pytest.raises(UsageError, match=r"has no method thinking: set generate\.thinking_share=0"):
        task.demonstration(task.item(0), thinking=True)


def test_its_verdict_and_its_reward_count(tmp_path: Path) -> None:
    task, path = _task(tmp_path), write(tmp_path, "rewards.py", REWARD)
    config = RewardConfig(terms={"accuracy": 1.0, f"{path}:brevity": 0.5})
    item = task.item(0)
    texts = [compose("", f" {item.answer} "), compose("", "no"), "a" * 40, ""]
    with Scorer(config, task, max_completion_length=64) as scorer:
        (scores,) = scorer.score_groups([(item, [Completion(text, 5, False) for text in texts])])
        assert scorer.sentences() == []
    assert [score.correct for score in scores] == [True, False, False, False]
    assert [score.terms["brevity"] for score in scores] == [
        pytest.approx(max(0.0, 1 - len(text) / 40)) for text in texts
    ]
    assert [score.reward for score in scores] == [
        pytest.approx(score.correct + 0.5 * score.terms["brevity"]) for score in scores
    ]


def test_a_reward_is_given_prompt_completion_answer_and_metadata(tmp_path: Path) -> None:
    text = """
        def score(prompt, completion, answer, metadata):
            print("dropped")
            assert input is not None
            return float((prompt, completion, answer, metadata) == ("2*7=", "x", "14", {"number": 7}))
    """
    from r1hpc.tasks.problems.task import Item

    item = Item(3, "2*7=", "14", {"number": 7})
    with Scorer(_reward(tmp_path, text), _task(tmp_path), max_completion_length=64) as scorer:
        (scores,) = scorer.score_groups([(item, [Completion("x", 1, False), Completion("y", 1, False)])])
    assert [score.terms["score"] for score in scores] == [1.0, 0.0]


_IMPORTS = [
    ("import nothing_like_this", r"cannot be imported: ModuleNotFoundError: .*nothing_like_this.*line 1\)"),
    ("def f(:\n  pass", r"cannot be imported: SyntaxError: .*line 1\)"),
    ("x = 1", r"has no function or class (score|Doubling)"),
    ("import sys\nsys.exit(3)", r"cannot be imported: it calls sys\.exit\(3\)"),
    ("1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(own_\d+\.py, line 1\)"),
    ("import os\nos._exit(0)", r"importing it ends the process"),
]


@pytest.mark.parametrize(("text", "said"), _IMPORTS)
def test_what_cannot_be_imported_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        _task(tmp_path, text)
    assert "\n" not in str(caught.value)
    task = _task(tmp_path)
    scorer = Scorer(_reward(tmp_path, text), task, max_completion_length=64)
    with scorer, pytest.raises(UsageError, match=said):
        scorer.try_out(task.item(0))


def test_a_judge_of_ours_that_cannot_judge_the_task_is_named(tmp_path: Path) -> None:
    """`choice` looks the choices up in the metadata: without them every answer would be wrong."""
    text = """
        class Letters:
            judge = "choice"
            def question(self, index):
                return f"{index}: A) yes B) no?", "A", METADATA
    """
    for metadata, said in (
        ("{}", "calls the task's own answer 'A' wrong"),
        ('{"choices": ["yes", "no"]}', ""),
    ):
        path = write(tmp_path, f"own_{next(_numbers)}.py", text.replace("METADATA", metadata))
        reward = _reward(tmp_path, "def score(prompt, completion, answer, metadata):\n    return 0.5\n")
        config = RunConfig(stage="rl", task=TaskConfig(f"{path}:Letters"), reward=reward)
        if said:
            with pytest.raises(UsageError, match=said):
                check_questions(config)
        else:
            assert check_questions(config)


def test_an_import_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_OWN_START_LIMIT_S", 1.0)
    with pytest.raises(UsageError, match="importing it takes over 1 s"):
        _task(tmp_path, "import time\ntime.sleep(60)")


_CALLS = [
    ("raise ValueError('no\\nreally')", r"failed in score: ValueError: no really \(own_\d+\.py, line 3\)"),
    ("return float('nan')", "gave nan, not a finite number"),
    ("return 'much'", "gave 'much', not a number"),
    ("return None", "gave None, not a number"),
    ("import sys; sys.exit('bye')", r"it calls sys\.exit\('bye'\)"),
    ("while True: pass", r"took over 0\.5 s \(reward\.timeout_s\)"),
    ("import os; os._exit(1)", "ended its process"),
    ("input()", "failed in score: EOFError"),
    ("import os; os.system('true')", "os.system while an answer is judged"),
    ("return _quietly(lambda: exec('x = 1'))", r"gave 0 after a forbidden act .*\(compile\)"),
    ("return _quietly(lambda: exec('x = 1')) - 1", r"gave -1 after a forbidden act .*\(compile\)"),
    ("return _quietly(lambda: exec('x = 1')) or 1.0", r"gave 1 after a forbidden act .*\(compile\)"),
    ("import timeit; return timeit.timeit('1', number=1)", "compile while an answer is judged"),
    ("return 10**400", r"gave a number above 1e308, not a finite number"),
    ("return -float('inf')", "gave -inf, not a finite number"),
    ("return type('N', (), {'__float__': lambda _: 1 / 0})()", "not a number"),
    ("import os; os.write(_replies(), b'0000'); return 1.0", "ended its process"),
    ("import os; os.write(_replies(), _frame('[[]]')); return 1.0", "ended its process"),
    ("import os; os.write(_replies(), _frame('7')); return 1.0", "ended its process"),
]


_QUIETLY = """
def _quietly(act):
    try:
        act()
        return 1.0
    except Exception:
        return 0.0

def _replies():
    import os
    files = [f"/proc/self/fd/{number}" for number in range(3, 20)]
    return [int(file[14:]) for file in files if os.path.exists(file) and "pipe" in os.readlink(file)][-1]

def _frame(text):
    return len(text).to_bytes(4, "big") + text.encode()
"""


@pytest.mark.parametrize(("line", "said"), _CALLS)
def test_a_reward_that_fails_counts_0_and_is_one_sentence(tmp_path: Path, line: str, said: str) -> None:
    text = f"\ndef score(prompt, completion, answer, metadata):\n    {line}\n{_QUIETLY}"
    task = _task(tmp_path)
    item, right = task.item(0), Completion(compose("", task.item(0).answer), 1, False)
    with Scorer(_reward(tmp_path, text, timeout_s=30.0), task, max_completion_length=64) as scorer:
        if "while" in line:  # of the reward alone: the verifier may be slow, and would be wrong
            scorer._own["score"]._timeout_s = 0.5
        (scores,) = scorer.score_groups([(item, [right, right])])
        assert [(score.reward, score.failed) for score in scores] == [(1.0, True)] * 2
        (sentence,) = scorer.sentences()
        assert scorer.stats.failures == 1, "equal completions are asked of once"
        with pytest.raises(UsageError, match=said):
            scorer.try_out(item)
    assert "\n" not in sentence


def test_a_reply_that_nobody_asked_for_judges_no_other_completion(tmp_path: Path) -> None:
    """It is found at the next request: its completion has a fresh process."""
    text = f"""
def score(prompt, completion, answer, metadata):
    import os
    if completion == "forges":
        os.write(_replies(), _frame("[1, [1.0]]"))
    return 0.25 if completion == "forges" else 0.5
{_QUIETLY}"""
    task = _task(tmp_path)
    with Scorer(_reward(tmp_path, text, timeout_s=30.0), task, max_completion_length=64) as scorer:
        texts = [Completion(each, 1, False) for each in ("forges", "next", "last")]
        (scores,) = scorer.score_groups([(task.item(0), texts)])
        assert [score.terms["score"] for score in scores][1:] == [0.5, 0.5]
        assert scorer.stats.restarts == 1


def test_the_guard_is_no_attribute_to_reset_and_secrets_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
def score(prompt, completion, answer, metadata):
    import os, _posixsubprocess
    from r1hpc.tasks.sandbox import guard
    guard._armed = False
    with guard.armed():
        pass
    if completion == "secret":
        return float("HF_TOKEN" in os.environ or "sesame" in "".join(os.environ.values()))
    if completion == "parent":
        return len(open(f"/proc/{os.getppid()}/environ").read())
    if completion == "fork":
        return _posixsubprocess.fork_exec([b"true"], [b"/bin/true"], True, (), None, None, *[-1] * 8,
                                          False, False, None, None, None, -1, None, False)
    os.system("true")
    return 1.0
"""
    monkeypatch.setenv("HF_TOKEN", "open sesame")
    task = _task(tmp_path)
    with Scorer(_reward(tmp_path, text, timeout_s=30.0), task, max_completion_length=64) as scorer:
        texts = [Completion(each, 1, False) for each in ("secret", "parent", "fork", "system")]
        (scores,) = scorer.score_groups([(task.item(0), texts)])
        assert [(score.terms["score"], score.failed) for score in scores] == [(0, False)] + [(0, True)] * 3
        assert [sentence.count("ForbiddenError") for sentence in scorer.sentences()] == [1, 1, 1]


def test_failures_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "_MOST_FAILURES", 3)
    text = "def score(prompt, completion, answer, metadata):\n    return 1 / (len(completion) - 1)\n"
    task = _task(tmp_path)
    with Scorer(_reward(tmp_path, text), task, max_completion_length=64) as scorer:
        mixed = [Completion(each, 1, False) for each in ("a", "bb", "a")]
        for scores in scorer.score_groups([(task.item(0), mixed)] * 4):
            assert [score.failed for score in scores] == [True, False, True]
        with pytest.raises(R1hpcError, match=r"ZeroDivisionError.*; so on 3 completions in a row"):
            scorer.score_groups([(task.item(index), mixed[:1]) for index in range(3)])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def question(self, index): return 1 / 0", "failed in question: ZeroDivisionError"),
        ("def question(self, index): return 'only a prompt'", r"not \(prompt, answer\)"),
        ("def question(self, index): return 'p', 7", "the answer is 7, not text"),
        ("def question(self, index): return 'p', 'a', {'x': {1}}", "plain JSON values"),
        ("pass", r"has no method question\(index\)"),
        ("judge = 'mine'\n    def question(self, index): return 'p', 'a'", "judge is 'mine'"),
        ("def __len__(self): return 0\n    def question(self, index): return 'p', 'a'", "has no question"),
    ],
)
def test_a_task_that_is_none_is_one_sentence(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        _task(tmp_path, f"class T:\n    {body}\n", "T").item(0)


def test_an_option_it_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unexpected keyword argument 'lagrest'"):
        _task(tmp_path, lagrest=3)


def test_submission_tries_everything_once(tmp_path: Path) -> None:
    task, good = write(tmp_path, "my_task.py", TASK), write(tmp_path, "rewards.py", REWARD)
    fails = write(tmp_path, "fails.py", "def score(prompt, completion, answer):\n    return 1.0\n")

    def config(reward: str) -> RunConfig:
        return RunConfig(
            stage="rl", task=TaskConfig(f"{task}:Doubling"), reward=RewardConfig(terms={reward: 1.0})
        )

    (item,) = check_questions(config(f"{good}:brevity"))
    assert item.prompt.startswith("2*")
    with pytest.raises(
        UsageError,
        match=r"takes \(prompt, completion, answer\), and .*\(prompt, completion, answer, metadata\)",
    ):
        check_questions(config(f"{fails}:score"))


def test_two_terms_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "rewards.py", "def accuracy(*a): return 1.0")
    config = RewardConfig(terms={"accuracy": 1.0, f"{path}:accuracy": 1.0})
    with pytest.raises(UsageError, match="would be reported as another term's: rename accuracy"):
        Scorer(config, make_task(TaskConfig("chain_sum")), max_completion_length=64)


def test_the_id_is_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ids = []
    for folder, text in (("a", TASK), ("b", TASK), ("a", TASK.replace("99", "98"))):
        path = write(tmp_path / folder, "mine.py", text)
        ids.append(make_task(TaskConfig(f"{path}:Doubling", 0, {"largest": 9})).id)
    assert ids[0] == ids[1] != ids[2]
    assert json.loads(ids[0][ids[0].index("{") :]) == {"largest": 9}
