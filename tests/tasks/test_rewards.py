"""Rewards of groups: weights, the gate, and demonstrations that are always right."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.rl import RewardConfig, TaskConfig
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Item, Task
from r1hpc.tasks.rewards import Completion, Score, Scorer
from r1hpc.tasks.text.format import compose

pytestmark = pytest.mark.usefixtures("no_process_left")

_DAPO = Path(__file__).parents[2] / "configs" / "rl" / "dapo.yaml"
_TASK = make_task(TaskConfig("chain_sum"))
_ITEM = _TASK.item(0)
_RIGHT, _WRONG = compose("", _ITEM.answer), compose("", "x")
_BARE_RIGHT, _BARE_WRONG = f"<answer>{_ITEM.answer}</answer>", "<answer>x</answer>"


def _scores(texts: Sequence[str], lengths: Sequence[int] = (), **options: object) -> list[Score]:
    completions = [
        Completion(text, length, False)
        for text, length in zip(texts, lengths or [9] * len(texts), strict=True)
    ]
    config = RewardConfig(**options)  # type: ignore[arg-type]
    with Scorer(config, _TASK, max_completion_length=40) as scorer:
        return scorer.score_groups([(_ITEM, completions)])[0]


def test_reward_is_the_weighted_sum_of_its_terms() -> None:
    scores = _scores([_RIGHT, _WRONG, _BARE_RIGHT, "4"])
    assert [score.reward for score in scores] == pytest.approx([1.1, 0.1, 1.0, 0.0])
    assert [score.terms for score in scores[:2]] == [
        {"accuracy": 1.0, "format": 1.0},
        {"accuracy": 0.0, "format": 1.0},
    ]
    assert [(score.correct, score.well_formed) for score in scores] == [
        (True, True),
        (False, True),
        (True, False),
        (False, False),
    ]


@pytest.mark.parametrize("texts", [[_WRONG, _BARE_WRONG, ""], [_RIGHT, _BARE_RIGHT]])
def test_the_gate_takes_format_from_a_group_that_differs_only_there(texts: list[str]) -> None:
    gated, ungated = _scores(texts), _scores(texts, gate_format=False)
    assert len({score.reward for score in gated}) == 1
    assert len({score.reward for score in ungated}) == 2
    assert [score.terms for score in gated] == [score.terms for score in ungated], "what is logged of it"
    assert [score.well_formed for score in gated] == [score.well_formed for score in ungated]


def test_the_gate_is_not_opened_by_a_length() -> None:
    """All wrong, one of them longer than it may be: their form must not be what tells them apart."""
    terms = {"accuracy": 1.0, "format": 0.1, "overlong": 1.0}
    scores = _scores([_WRONG, _BARE_WRONG], [9, 36], terms=terms)
    assert [score.reward for score in scores] == pytest.approx([0.0, -0.5])
    right = _scores([_RIGHT, _BARE_WRONG], [9, 36], terms=terms)
    assert [score.reward for score in right] == pytest.approx([1.1, -0.5])


def test_dapo_punishes_length_as_its_paper_does() -> None:
    """Beside a reward of 1 or -1 (2503.14476, section 3.4 and eq. 13); the same on half the scale."""
    terms = {**yaml.safe_load(_DAPO.read_text())["reward"]["terms"], "format": 0.0}
    for length, punishment in ((9, 0.0), (32, 0.0), (36, -0.5), (40, -1.0)):
        right, wrong = _scores([_RIGHT, _WRONG], [length, length], terms=terms)
        assert right.reward == pytest.approx((1 + punishment + 1) / 2)
        assert wrong.reward == pytest.approx((-1 + punishment + 1) / 2)


def test_the_gate_leaves_one_that_is_alone() -> None:
    """PPO's groups may have one member, which is normalised by nobody."""
    (alone,) = _scores([_WRONG])
    assert alone.reward == pytest.approx(0.1)


def test_the_gate_leaves_a_group_that_differs_elsewhere() -> None:
    assert [score.reward for score in _scores([_RIGHT, _BARE_WRONG])] == pytest.approx([1.1, 0.0])


def test_the_gate_looks_at_each_group_by_itself() -> None:
    completions = [Completion(text, 9, False) for text in (_WRONG, _BARE_WRONG, _RIGHT)]
    groups = [(_ITEM, completions[:2]), (_ITEM, completions[1:])]
    with Scorer(RewardConfig(), _TASK, max_completion_length=40) as scorer:
        together = scorer.score_groups(groups)
        assert together == [scorer.score_groups([group])[0] for group in groups]
    assert [score.reward for score in together[0]] == [0.0, 0.0]


def test_tokens_are() -> None:
    terms = {"accuracy": 0.6, "efficiency_tokens": 0.3}
    short, long = _scores([_RIGHT, _RIGHT], [4, 40], terms=terms)
    assert short.reward - long.reward == pytest.approx(0.3 * 0.9)


def test_the_articles_reward() -> None:
    terms = {"accuracy": 0.6, "efficiency_tokens": 0.3, "diversity": 0.1}
    (score,) = _scores([compose("1234567", _ITEM.answer)], [10], terms=terms)
    assert set(score.terms) == set(terms)
    assert score.reward == pytest.approx(0.6 + 0.3 * 0.75 + 0.1 * score.terms["diversity"])


def test_an_unknown_term_is_refused_before_a_process_starts() -> None:
    with pytest.raises(UsageError, match=r"reward\.terms\.beauty is unknown"):
        Scorer(RewardConfig(terms={"beauty": 1.0}), _TASK, max_completion_length=40)


def test_no_groups_and_empty_groups() -> None:
    with Scorer(RewardConfig(), _TASK, max_completion_length=40) as scorer:
        assert scorer.score_groups([]) == []
        assert scorer.score_groups([(_ITEM, [])]) == [[]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chain_sum", {}),
        ("chain_sum", {"num_terms": 40}),
        ("countdown", {}),
        ("countdown", {"num_numbers": 6, "max_number": 100, "max_target": 999}),
    ],
)
def test_demonstrations_are_right_and_well_formed(name: str, options: dict[str, object]) -> None:
    task = make_task(TaskConfig(name, 3, options))
    groups = [(item, _shown(task, item)) for item in map(task.item, range(2000))]
    with Scorer(RewardConfig(timeout_s=30.0), task, max_completion_length=400) as scorer:
        scores = [score for group in scorer.score_groups(groups) for score in group]
    assert len(scores) == 4000
    assert all(score.correct and score.well_formed for score in scores)


def _shown(task: Task, item: Item) -> list[Completion]:
    texts = [task.demonstration(item, thinking) for thinking in (False, True)]
    return [Completion(text, len(text), False) for text in texts]


def test_chain_sum_as_written_down() -> None:
    item = Item(0, "224538=", "4")
    assert _TASK.demonstration(item, thinking=True) == "<think>248364</think><answer>4</answer>"
    assert _TASK.demonstration(item, thinking=False) == "<think></think><answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("3*7+12", True),
        ("12+7*3", True),
        ("(12+(7*(3)))", True),
        (" 3 * 7 + 12\n", True),
        ("3*7+12+0", False),
        ("33", False),
        ("3*7+12=33", False),
        ("3*7+12*1", False),
        ("3+7+12", False),
        ("12/(3-3)+7", False),
        ("12/(7-7)", False),
        ("-3*-7+12", False),
        ("3*7+12.0", False),
        ("3*7+012", False),
        ("\uff13*7+12", False),
        ("3**7+12", False),
    ],
)
def test_countdown_wants_each_number_once(text: str, right: bool) -> None:
    task = make_task(TaskConfig("countdown"))
    item = Item(0, "3,7,12:33?", "3*7+12", {"numbers": [3, 7, 12], "target": 33})
    with Scorer(RewardConfig(), task, max_completion_length=40) as scorer:
        scores = scorer.score_groups([(item, [Completion(compose("", text), 9, False)])])
    assert scores[0][0].correct == right
