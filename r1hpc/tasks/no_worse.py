"""Whether one model may be called no worse than another, after both were asked the same questions.

    verdict = judge_loss(compare_answers(original, export), margin=0.02)
    verdict.no_worse, verdict.text

That two models are not told apart does not show that they are equal: a few questions tell nothing apart. B is
no worse where the comparison does not call it worse, and the interval of its loss ends before the margin
(non-inferiority; Piaggio et al., JAMA 2012, 308:2594).
"""

import math
from dataclasses import dataclass

from r1hpc.tasks.comparison import Comparison
from r1hpc.tasks.statistics import wilson


@dataclass(frozen=True)
class Verdict:
    """What may be said of B beside A."""

    no_worse: bool
    text: str


def judge_loss(found: Comparison, margin: float) -> Verdict:
    """The verdict on B; `margin` is the loss of accuracy that is not to be, as a share of the questions."""
    accuracy, won = found.accuracy, found.discordance
    gain, low, high = accuracy.b - accuracy.a, accuracy.low, accuracy.high
    least, _ = wilson(won.both + won.only_a, found.num_questions)
    if found.verdict == "a":
        return Verdict(False, f"worse by {-gain:.1%} of the questions [{-high:.1%}, {-low:.1%}]")
    if least <= margin:
        return Verdict(
            False,
            f"not shown to be no worse: the original is right in {accuracy.a:.1%} of the questions, where "
            f"a loss of {margin:.1%} would not show",
        )
    seen = f"{gain:+.1%} of the questions [{low:+.1%}, {high:+.1%}]"
    if low < -margin:
        return Verdict(
            False,
            f"not shown to be no worse: {seen}, so a loss of more than {margin:.1%} is not excluded; ask "
            f"{_enough(found.num_questions, gain, low, margin)}",
        )
    return Verdict(True, f"no worse: {seen}, so a loss of more than {margin:.1%} is excluded")


def _enough(num_questions: int, gain: float, low: float, margin: float) -> str:
    """How many questions would do, if the difference stayed as it is: intervals shrink with the root."""
    if gain <= -margin:
        return "more questions"
    more = num_questions * ((gain - low) / (gain + margin)) ** 2
    return f"some {math.ceil(more / 100) * 100:,} questions"
