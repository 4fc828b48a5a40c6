"""Rewards of groups of completions: verdicts from the verifier's process, terms, weights, and the gate.

    with Scorer(config.reward, task, max_completion_length=64) as scorer:
        scores = scorer.score_groups([(item, completions), ...])
        scores[0][0].reward, scores[0][0].terms["accuracy"]

A group is scored without a look at the others: one call of many groups and many calls of one give the same,
so a caller may look for a signal in between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from r1hpc.base.errors import UsageError
from r1hpc.config.reasoning import RewardConfig
from r1hpc.tasks.completion import Parts, take_apart
from r1hpc.tasks.task import Item, Task
from r1hpc.tasks.terms import Completion, Judged, term_named
from r1hpc.tasks.verifier import Question, Verifier, VerifierStats

__all__ = ["Completion", "Score", "Scorer"]

Group = tuple[Item, Sequence[Completion]]


@dataclass(frozen=True)
class Score:
    """`terms` hold each term before its weight and before the gate, which only the reward passes."""

    reward: float
    terms: dict[str, float]
    correct: bool
    well_formed: bool


class Scorer:
    """Owns the verifier's process: close it, or use `with`."""

    def __init__(
        self,
        config: RewardConfig,
        task: Task,
        *,
        max_completion_length: int,
        flops_per_token: float | None = None,
    ) -> None:
        self._terms = {name: term_named(name) for name in config.terms}
        if "efficiency_flops" in config.terms and flops_per_token is None:
            raise UsageError(
                "reward.terms.efficiency_flops needs the model's FLOPs per token, which are not known here; "
                "take efficiency_tokens"
            )
        self._weights = dict(config.terms)
        self._gate = config.gate_format and "format" in config.terms
        self._max_completion_length = max_completion_length
        self._flops_per_token = flops_per_token
        self._verifier = Verifier(task.judge, task.judge_settings, config.timeout_s)

    @property
    def stats(self) -> VerifierStats:
        """What the verifier met so far: time-outs, restarts, refused answers."""
        return self._verifier.stats

    def score_groups(self, groups: Sequence[Group]) -> list[list[Score]]:
        """Scores in the order of the groups and their completions. Deterministic but for time-outs."""
        parts = [[take_apart(c.text, c.truncated) for c in completions] for _, completions in groups]
        verdicts = iter(self._verdicts(groups, parts))
        scored = []
        for (item, completions), apart in zip(groups, parts, strict=True):
            scores = [self._score(item, *pair, verdicts) for pair in zip(completions, apart, strict=True)]
            scored.append(self._gated(scores) if self._gate else scores)
        return scored

    def close(self) -> None:
        """End the verifier's process."""
        self._verifier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verdicts(self, groups: Sequence[Group], parts: list[list[Parts]]) -> list[bool]:
        """Whether each completion that has an answer is right, in order."""
        return self._verifier.check(
            [
                Question(part.answer, item.answer, item.metadata)
                for (item, _), apart in zip(groups, parts, strict=True)
                for part in apart
                if part.answer is not None
            ]
        )

    def _score(self, item: Item, completion: Completion, parts: Parts, verdicts: Iterator[bool]) -> Score:
        judged = Judged(
            item=item,
            completion=completion,
            correct=parts.answer is not None and next(verdicts),
            well_formed=parts.well_formed,
            max_completion_length=self._max_completion_length,
            flops_per_token=self._flops_per_token,
        )
        terms = {name: term(judged) for name, term in self._terms.items()}
        return Score(self._weighted(terms), terms, judged.correct, judged.well_formed)

    def _weighted(self, terms: dict[str, float]) -> float:
        return sum(self._weights[name] * value for name, value in terms.items())

    def _gated(self, scores: list[Score]) -> list[Score]:
        """Without the format term where nothing else tells the members apart.

        There, normalising by the group's deviation would make the smallest format weight the whole signal
        (open-instruct issue 659: the policy collapses to form without content).
        """
        rewards = [self._weighted({**score.terms, "format": 0.0}) for score in scores]
        if len(set(rewards)) > 1:
            return scores
        return [replace(score, reward=reward) for score, reward in zip(scores, rewards, strict=True)]
