"""Reward groups of completions: verdicts from the verifier's process, terms, weights, and the gate.

train/rollout/judge.py calls it for rollouts, evaluations and stage generate. The gate drops the format term
from a group whose rewards differ only by form and length. Groups are scored independently: one call with many
groups and many calls with one give the same, so a caller may check for a signal in between.

A built-in term is a number from 0 to 1 for one completion (`overlong`: from 0 to -1), a custom one any finite
number. A new built-in one is a function here and a line in TERMS; every term is logged by its name.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Self

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.config.paths import is_own
from r1hpc.config.schema.rl import RewardConfig
from r1hpc.tasks.grading.judges import OWN_SCORE
from r1hpc.tasks.grading.verifier import Question, ShouldStop, Verifier, VerifierStats
from r1hpc.tasks.problems.task import Item, Verifiable, members
from r1hpc.tasks.text.format import Parts, compose, take_apart, without_tags

_MAX_TEXT = 1 << 16
"""Characters that the terms on text read: bounds their time, far above any completion's length."""
_WORD = re.compile(r"[^\W\d_]+|\S")


@dataclass(frozen=True)
class Completion:
    """A policy's text after the prompt. `num_tokens` counts its end token; `truncated` text lacks one."""

    text: str
    num_tokens: int
    truncated: bool


@dataclass(frozen=True)
class Judged:
    """A completion with all that a term may use."""

    item: Item
    completion: Completion
    correct: bool
    well_formed: bool
    max_completion_length: int
    overlong_share: float = 0.2


Term = Callable[[Judged], float]


def accuracy(judged: Judged) -> float:
    """Return 1 for a right answer (DeepSeek-R1's rule-based reward)."""
    return float(judged.correct)


def well_formed(judged: Judged) -> float:
    """Return 1 for the form that format.take_apart calls well-formed; the Scorer may gate it."""
    return float(judged.well_formed)


def language(judged: Judged) -> float:
    """Return the share of the completion's letters in the prompt's script; 1 if either has no letters.

    DeepSeek-R1 counts words of the target language, to stop a chain of thought from mixing two; letters need
    no word list. The script is the first word of a letter's Unicode name; Japanese counts as CJK.
    """
    wanted = _scripts(judged.item.prompt)
    written = _scripts(without_tags(judged.completion.text[:_MAX_TEXT]))
    if not wanted or not written:
        return 1.0
    (script, _), *_ = wanted.most_common(1)
    return written[script] / written.total()


def efficiency_tokens(judged: Judged) -> float:
    """Return 1 - length / longest length: an efficiency reward that distinguishes completions."""
    return max(0.0, 1.0 - judged.completion.num_tokens / judged.max_completion_length)


def diversity(judged: Judged) -> float:
    """Return the entropy of the completion's bigrams over that of as many different ones; 0 for under two.

    The article's "n-gram entropy" with n = 2. A word is a run of letters; each digit or sign is one too.
    Tags do not count: they are the same everywhere.
    """
    words = _WORD.findall(without_tags(judged.completion.text[:_MAX_TEXT]))
    counts = Counter(pairwise(words))
    total = counts.total()
    if total < 2:
        return 0.0
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    return min(1.0, max(0.0, entropy / math.log(total)))


def overlong(judged: Judged) -> float:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to a length, then down to -1.

    Truncated text gets -1. The paper uses 4,096 of 20,480 tokens, a fifth, and adds it to an accuracy of 1 or
    -1; beside an accuracy of 1 or 0 the same is a weight of 0.5.
    """
    if judged.completion.truncated:
        return -1.0
    longest = judged.max_completion_length
    buffer = judged.overlong_share * longest
    return min(0.0, (longest - judged.completion.num_tokens) / buffer - 1)


TERMS: dict[str, Term] = {
    "accuracy": accuracy,
    "format": well_formed,
    "language": language,
    "efficiency_tokens": efficiency_tokens,
    "diversity": diversity,
    "overlong": overlong,
}


def term_named(name: str) -> Term:
    """Return the term of that name; raise UsageError if there is none."""
    if name not in TERMS:
        raise UsageError(
            f"reward.terms.{name} is unknown{nearest(name, TERMS)}; the terms are: {', '.join(TERMS)}"
        )
    return TERMS[name]


def _scripts(text: str) -> Counter[str]:
    scripts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            scripts[_script(char)] += count
    return scripts


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """Return LATIN, GREEK, CYRILLIC, CJK ... Full-width and mathematical letters count as plain ones."""
    plain = unicodedata.normalize("NFKC", char)[:1]
    word = unicodedata.name(plain, "UNKNOWN").split("-")[0].split()[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA") else word


Group = tuple[Item, Sequence[Completion]]
Taken = tuple[Item, Completion, Parts]
Verdict = tuple[bool, bool]
"""(the answer is right, judging it failed)"""
Value = tuple[float, bool]
"""(a custom term's value, it failed)"""


@dataclass(frozen=True)
class Score:
    """`terms` hold each term before its weight and before the gate, which only affects the reward."""

    reward: float
    terms: dict[str, float]
    correct: bool
    well_formed: bool
    failed: bool = False
    """The judge or a custom term failed on it: it counts as wrong, or as 0 of that term."""


def label(term: str) -> str:
    """Return the name under which a term is reported; for custom code the part after the colon."""
    return term.rpartition(":")[2] if is_own(term) else term


class Scorer:
    """Owns the verifiers' processes, one for each task and custom term: close it, or use `with`."""

    def __init__(
        self, config: RewardConfig, *tasks: Verifiable, max_completion_length: int, code: Path | None = None
    ) -> None:
        """`tasks` are all whose items will be scored; `code`: see registry.make_task. Raise UsageError for an
        unknown term, or two of one label."""
        _refuse_one_label(config, tasks)
        self._terms = {name: term_named(name) for name in config.terms if not is_own(name)}
        self._weights = {label(name): weight for name, weight in config.terms.items()}
        self._gate = config.gate_format and "format" in config.terms
        self._overlong_share = config.overlong_share
        self._boxed = config.answer_in == "boxed"
        self._max_completion_length = max_completion_length
        self._verifiers = {
            name: Verifier(task.judge, task.judge_settings, config.timeout_s)
            for each in tasks
            for name, task in members(each).items()
        }
        self._own = {
            label(name): Verifier(OWN_SCORE, {"spec": name, "code": code and str(code)}, config.timeout_s)
            for name in filter(is_own, config.terms)
        }

    @property
    def stats(self) -> VerifierStats:
        """Return the verifiers' counts so far: time-outs, restarts, refused answers."""
        return VerifierStats.joined([each.stats for each in self._all()])

    def try_out(self, item: Item, *, of_own_task: bool = False) -> None:
        """Call every custom term, and a judge if it or the task is custom, once on the item's answer.

        Raise UsageError with the first failure, or if a built-in judge calls the answer wrong. A custom judge
        may: its "answer" need not be one, only what it judges by.
        """
        right = Completion(compose("", item.answer), 1, False)
        verifier, is_right = self._verifiers[item.task], True
        if verifier.is_own or of_own_task:
            (is_right,) = verifier.check([Question(item.answer, item.answer, item.metadata)])
        for term in self._own.values():
            term.values([_own_question(item, right, {})])
        for sentence in self.sentences():
            raise UsageError(f"{sentence}; tried on the question {item.prompt!r:.80}")
        if not is_right and not verifier.is_own:
            raise UsageError(
                f"the task's judge calls the task's own answer {item.answer!r:.40} wrong, to the question "
                f"{item.prompt!r:.80}: no reward could be earned (does the judge need metadata?)"
            )

    def sentences(self) -> list[str]:
        """Return how custom code failed so far, and what no judge could judge; each kind once."""
        return [sentence for each in self._all() for sentence in each.sentences]

    def score_groups(
        self, groups: Sequence[Group], should_stop: ShouldStop = lambda: False
    ) -> list[list[Score]]:
        """Return scores in the order of the groups and their completions. Deterministic except for time-outs.
        Raise StopAsked if should_stop returned true; it is called between answers if the judge is slow."""
        taken = [
            (item, completion, take_apart(completion.text, completion.truncated, self._boxed))
            for item, completions in groups
            for completion in completions
        ]
        verdicts = self._verdicts(taken, should_stop)
        own = self._own_values(groups, should_stop)
        scores = map(self._score, taken, verdicts, own)
        scored = [list(islice(scores, len(completions))) for _, completions in groups]
        return [self._gated(group) for group in scored] if self._gate else scored

    def close(self) -> None:
        for each in self._all():
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _all(self) -> list[Verifier]:
        return [*self._verifiers.values(), *self._own.values()]

    def _verdicts(self, taken: Sequence[Taken], should_stop: ShouldStop) -> list[Verdict]:
        """Return the verdict on each completion; one without an answer is wrong."""
        asked: dict[str, dict[int, Question]] = {name: {} for name in self._verifiers}
        for place, (item, _, parts) in enumerate(taken):
            if parts.answer is not None:
                asked[item.task][place] = Question(parts.answer, item.answer, item.metadata)
        verdicts = [(False, False)] * len(taken)
        for name, verifier in self._verifiers.items():
            right = verifier.check(list(asked[name].values()), should_stop)
            for place, is_right, has_failed in zip(asked[name], right, verifier.failed, strict=True):
                verdicts[place] = is_right, has_failed
        return verdicts

    def _own_values(self, groups: Sequence[Group], should_stop: ShouldStop) -> list[dict[str, Value]]:
        """Return the custom terms' values of each completion by name; 0 for one that failed."""
        of_completions: list[dict[str, Value]] = [{} for _, completions in groups for _ in completions]
        if not self._own:
            return of_completions
        asked = []
        for item, completions in groups:
            shared: dict[str, object] = {}  # one object a group: equal completions are judged once
            asked += [_own_question(item, completion, shared) for completion in completions]
        for name, verifier in self._own.items():
            values = verifier.values(asked, should_stop)
            for own, value, has_failed in zip(of_completions, values, verifier.failed, strict=True):
                own[name] = float(value or 0.0), has_failed
        return of_completions

    def _score(self, taken: Taken, verdict: Verdict, own: dict[str, Value]) -> Score:
        (item, completion, parts), (correct, failed) = taken, verdict
        judged = Judged(
            item=item,
            completion=completion,
            correct=correct,
            well_formed=parts.well_formed,
            max_completion_length=self._max_completion_length,
            overlong_share=self._overlong_share,
        )
        terms = {n: own[n][0] if n in own else self._terms[n](judged) for n in self._weights}
        failed = failed or any(has_failed for _, has_failed in own.values())
        return Score(self._weighted(terms), terms, correct, judged.well_formed, failed)

    def _weighted(self, terms: dict[str, float]) -> float:
        return sum(weight * terms[name] for name, weight in self._weights.items())

    def _gated(self, scores: list[Score]) -> list[Score]:
        """Drop the format term if only it and their lengths distinguish the members.

        Otherwise, normalising by the group's deviation would make the smallest format weight the only signal
        (open-instruct issue 659: the policy collapses to form without content).
        """
        rewards = [self._weighted({**score.terms, "format": 0.0}) for score in scores]
        contents = {self._weighted({**score.terms, "format": 0.0, "overlong": 0.0}) for score in scores}
        if len(scores) == 1 or len(contents) > 1:  # a single member is compared with nothing
            return scores
        return [replace(score, reward=reward) for score, reward in zip(scores, rewards, strict=True)]


def _refuse_one_label(config: RewardConfig, tasks: Sequence[Verifiable]) -> None:
    """Refuse two things that would be reported as one."""
    labels = [label(name) for name in config.terms]
    for name in filter(is_own, config.terms):
        if labels.count(label(name)) > 1 or label(name) in TERMS:
            raise UsageError(
                f"reward.terms: {name} would be reported as another term's: rename {label(name)}"
            )
    names = [name for task in tasks for name in members(task)]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name} is a label of task.mix and of evaluate.sets: rename one")


def _own_question(item: Item, completion: Completion, shared: dict[str, object]) -> Question:
    if not shared:
        shared.update(prompt=item.prompt, metadata=dict(item.metadata))
    return Question(completion.text, item.answer, shared)
