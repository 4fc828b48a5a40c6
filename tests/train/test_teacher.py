"""What is left out of a teacher's completions, and for which reason."""

import pytest

from r1hpc.corpus.recipe.stages import GenerateRecipe
from r1hpc.tasks.reward.rewards import Completion, Score
from r1hpc.train.generate.teacher import left_out

RIGHT, WRONG = Score(1.1, {}, correct=True, well_formed=True), Score(0.1, {}, correct=False, well_formed=True)
SAID = [
    (Completion("a", 9, False), RIGHT),
    (Completion("b", 5, False), RIGHT),
    (Completion("c", 3, False), WRONG),
    (Completion("d", 4, True), WRONG),
    (Completion("", 1, False), WRONG),
    (Completion("a", 9, False), RIGHT),
]
CUT, EMPTY, AGAIN = "generate.truncated", "generate.empty", "generate.repeated"


@pytest.mark.parametrize(
    ("keep", "rules"),
    [
        ("all", [AGAIN, "", "", CUT, EMPTY, ""]),
        ("correct", [AGAIN, "", "generate.wrong", CUT, EMPTY, ""]),
        ("best", [AGAIN, "generate.not_best", "generate.wrong", CUT, EMPTY, ""]),
    ],
)
def test_every_completion_has_its_rule(keep: str, rules: list[str]) -> None:
    generate = GenerateRecipe("t", "p", answer="answer", keep=keep)
    assert left_out(SAID, 0.5, generate) == rules


@pytest.mark.parametrize(("rate", "is_kept"), [(0.24, False), (0.25, True), (0.75, True), (0.76, False)])
def test_bounds_of_the_pass_rate_are_inside(rate: float, is_kept: bool) -> None:
    generate = GenerateRecipe("t", "p", answer="answer", min_pass_rate=0.25, max_pass_rate=0.75)
    assert (set(left_out(SAID, rate, generate)) != {"generate.pass_rate"}) == is_kept


def test_braces_in_what_is_put_in_stay() -> None:
    generate = GenerateRecipe("t", "p", document="{question}|{prompt}|{completion}{x}")
    parts = {"question": "{completion}", "prompt": "{prompt}", "completion": "{question}"}
    assert generate.compose(**parts) == "{completion}|{prompt}|{question}{x}"
