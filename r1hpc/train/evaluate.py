"""Answer held-out items: greedily once, and several times at the rollout's temperature.

    answers = evaluator.answer(range(256), 8, should_stop)
    summary = summarise(answers)                        # greedy, pass@1, pass@k with their intervals

Used by stage rl between updates, and by stage evaluate as a job of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1hpc.base.failpoints import failpoint
from r1hpc.config.schema import RunConfig
from r1hpc.tasks.completion import take_apart
from r1hpc.tasks.rewards import Completion, Score, Scorer
from r1hpc.tasks.statistics import mean_interval, pass_at_k, wilson
from r1hpc.tasks.task import Item, Task
from r1hpc.train.prompts import Prompts
from r1hpc.train.sampling import Request, RolloutEngine, streams
from r1hpc.train.scoring import Judged, judge_samples

_EVALUATION_SEED = 0x5EED
"""The samples of an evaluation are the same for every run, whatever train.seed is."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one item."""

    index: int
    prompt: str
    expected: str
    greedy: str
    greedy_correct: bool
    greedy_length: int
    well_formed: bool
    num_samples: int
    num_correct: int
    sample: str
    """The first of the samples."""
    mean_length: float
    truncated: int
    num_thinking: int = 0
    """Samples whose thinking is not blank, and how many of those are correct."""
    num_thinking_correct: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Answers items with an engine that holds the weights to be judged."""

    def __init__(
        self, config: RunConfig, task: Task, prompts: Prompts, engine: RolloutEngine, scorer: Scorer
    ) -> None:
        self._config = config
        self._task = task
        self._prompts = prompts
        self._engine = engine
        self._scorer = scorer

    def answer(
        self, indices: Sequence[int], num_samples: int, should_stop: Callable[[], bool]
    ) -> list[Answer] | None:
        """Held-out items `indices`; None when asked to leave."""
        items = [self._task.item(index, held_out=True) for index in indices]
        failpoint("evaluate.batch")
        greedy = self.complete(items, 1, 0.0, should_stop)
        if greedy is None:
            return None
        sampled = self.complete(items, num_samples, self._config.rollout.temperature, should_stop)
        if sampled is None:
            return None
        return [_answer(item, g[0], s) for item, g, s in zip(items, greedy, sampled, strict=True)]

    def complete(
        self,
        items: Sequence[Item],
        num: int,
        temperature: float,
        should_stop: Callable[[], bool],
        seed: int = _EVALUATION_SEED,
    ) -> list[Judged] | None:
        """`num` judged completions of each item, prompts_per_batch items at a time; None: asked to leave."""
        size = self._config.rollout.prompts_per_batch or max(1, len(items))
        done: list[Judged] = []
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            request = Request(
                prompts=[self._prompts.ids(item) for item in batch],
                streams=streams(seed, [item.index for item in batch], num),
                num_generations=num,
                max_completion_length=self._config.rollout.max_completion_length,
                temperature=temperature,
            )
            samples = self._engine.sample(request, should_stop)
            if samples is None:
                return None
            judged = judge_samples(self._scorer, self._prompts, batch, samples, should_stop)
            if judged is None:
                return None
            done += judged
        return done


def _answer(
    item: Item, greedy: tuple[Completion, Score], sampled: Sequence[tuple[Completion, Score]]
) -> Answer:
    thinking = [
        score for completion, score in sampled if (take_apart(completion.text).thinking or "").strip()
    ]
    return Answer(
        index=item.index,
        prompt=item.prompt,
        expected=item.answer,
        greedy=greedy[0].text,
        greedy_correct=greedy[1].correct,
        greedy_length=greedy[0].num_tokens,
        well_formed=greedy[1].well_formed,
        num_samples=len(sampled),
        num_correct=sum(score.correct for _, score in sampled),
        sample=sampled[0][0].text,
        mean_length=sum(completion.num_tokens for completion, _ in sampled) / len(sampled),
        truncated=sum(completion.truncated for completion, _ in sampled),
        num_thinking=len(thinking),
        num_thinking_correct=sum(score.correct for score in thinking),
    )


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """Shares and means over the items, each with its 95 % interval.

    Returns: {num_items, num_samples, greedy: {value, low, high}, pass_at: {"1": {...}, "2": ...},
    well_formed, response_length, truncated_share, thinking_share, accuracy_given_thinking (None: no sample
    thinks)}; the last two are over all samples
    """
    num, correct = len(answers), sum(a.greedy_correct for a in answers)
    num_samples = answers[0].num_samples
    ks = [2**e for e in range(num_samples.bit_length()) if 2**e <= num_samples]
    low, high = wilson(correct, num)
    thinking = sum(a.num_thinking for a in answers)
    pass_at = {str(k): _interval([pass_at_k(a.num_samples, a.num_correct, k) for a in answers]) for k in ks}
    return {
        "num_items": num,
        "num_samples": num_samples,
        "greedy": {"value": correct / num, "low": low, "high": high},
        "pass_at": pass_at,
        "well_formed": sum(a.well_formed for a in answers) / num,
        "response_length": sum(a.mean_length for a in answers) / num,
        "truncated_share": sum(a.truncated for a in answers) / (num * num_samples),
        "thinking_share": thinking / (num * num_samples),
        "accuracy_given_thinking": (
            sum(a.num_thinking_correct for a in answers) / thinking if thinking else None
        ),
    }


def transcripts(answers: Sequence[Answer], most: int = 20) -> str:
    """What the model was asked and what it said, for a person: the wrong ones first."""
    chosen = sorted(answers, key=lambda a: a.greedy_correct)[: most // 2]
    chosen += [a for a in answers if a.greedy_correct][: most - len(chosen)]
    blocks = []
    for a in chosen:
        verdict = "correct" if a.greedy_correct else f"WRONG, expected {a.expected}"
        blocks.append(
            f"--- item {a.index}: {verdict}; {a.num_correct} of {a.num_samples} samples correct\n"
            f"prompt  {a.prompt}\ngreedy  {a.greedy}\nsample  {a.sample}\n"
        )
    return "\n".join(blocks)


def _interval(values: Sequence[float]) -> dict[str, float]:
    value, low, high = mean_interval(values)
    return {"value": value, "low": low, "high": high}
