"""Turn a task's items into judged completions: encode the prompts, sample, let the verifier score.

Rollouts, evaluations and rejection sampling share it; what decides on one answer is in tasks/grading/. It
checks `should_stop` in between, so that a rank stops within seconds of a request.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from r1hpc.base.errors import UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.model.shape import load_model_config
from r1hpc.plan.topology.parts import num_items, prompts_per_batch
from r1hpc.tasks.grading.verifier import StopAsked
from r1hpc.tasks.problems.benchmark import Benchmarks
from r1hpc.tasks.problems.file import QuestionFile
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Item, Task, check_num_held_out, members
from r1hpc.tasks.rewards import Completion, Score, Scorer
from r1hpc.tasks.text.format import PromptForm, SpecialIds, decode, encode, prompt_ids
from r1hpc.tasks.text.tokenizer import (
    asking_id,
    fitting,
    form_of,
    load_tokenizer,
    special_ids,
    vocabulary_size,
)
from r1hpc.train.loop.session import Job
from r1hpc.train.rollout.groups import Groups
from r1hpc.train.rollout.policy import build_rollout_engine
from r1hpc.train.rollout.torch_engine import WHOLE, Cut, Request, RolloutEngine, Samples, streams

_GROUPS_AT_ONCE = 16

Scored = list[tuple[Completion, Score]]
ShouldStop = Callable[[], bool]


class Judge:
    """Samples from the model whose weights the engine holds, and scores the questions of a run's task."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        tokenizer: tokenizers.Tokenizer,
        form: PromptForm,
        engine: RolloutEngine,
        scorer: Scorer,
        ids: SpecialIds,
        benchmarks: Benchmarks | None = None,
    ) -> None:
        self.task = task
        self.evaluated: Task = benchmarks or task
        """The task of an evaluation: the test files, or the task's held-out part."""
        self.tokenizer = tokenizer
        self._form = form
        self.engine = engine
        self._config = config
        self._scorer = scorer
        self._ids = ids
        self._said: set[str] = set()
        self.sampling_s = 0.0
        """Seconds of sampling so far, without scoring."""
        ids_of = partial(prompt_ids, tokenizer, form, most=config.rollout.max_prompt_length)
        self._encode = lru_cache(maxsize=4096)(ids_of)

    @cached_property
    def asking_id(self) -> str:
        return asking_id(self._config.model, self._form, self._ids)

    def prompt(self, item: Item) -> tuple[int, ...]:
        """Return the tokens of the prompt in the model's prompt form; raise UsageError if it has none."""
        return self._encode(item.prompt, item.where)

    def sample(
        self,
        items: Sequence[Item],
        num: int,
        temperature: float,
        seed: int,
        should_stop: ShouldStop,
        cut: Cut = WHOLE,
    ) -> Samples | None:
        """Return `num` completions of each item, decoded together; None if a stop was requested."""
        request = Request(
            prompts=[self.prompt(item) for item in items],
            streams=streams(seed, [item.index for item in items], num),
            num_generations=num,
            max_completion_length=self._config.rollout.max_completion_length,
            temperature=temperature,
            cut=cut,
        )
        began = time.monotonic()
        samples = self.engine.sample(request, should_stop)
        self.sampling_s += time.monotonic() - began
        return samples

    def groups(self, indices: Sequence[int], version: int, should_stop: ShouldStop) -> Groups | None:
        """Return the scored groups of these items for training, sampled with the weights of `version`; None
        if a stop was requested."""
        rollout, seed = self._config.rollout, self._config.train.seed
        items = [self.task.item(index) for index in indices]
        failpoint("rollout.batch")
        samples = self.sample(items, rollout.num_generations, rollout.temperature, seed, should_stop)
        if samples is None:
            return None
        failpoint("reward.begin")
        scored = self.score(items, samples, should_stop)
        if scored is None:
            return None
        scores = [score for group in scored for _, score in group]
        return Groups(
            items=np.array([item.index for item in items], np.int64),
            tokens=samples.tokens,
            logprobs=samples.logprobs,
            versions=np.full(samples.tokens.shape, version, np.int32),
            lengths=samples.lengths,
            ended=samples.ended,
            rewards=np.array([score.reward for score in scores]),
            correct=np.array([score.correct for score in scores]),
            failed=np.array([score.failed for score in scores]),
            terms={name: np.array([s.terms[name] for s in scores]) for name in scores[0].terms},
            prompts=tuple(self.prompt(item) for item in items),
        )

    def score(self, items: Sequence[Item], samples: Samples, should_stop: ShouldStop) -> list[Scored] | None:
        """Return the completions of each item with their scores; None if a stop was requested."""
        groups = list(zip(items, self.read(samples, len(items)), strict=True))
        scored: list[Scored] = []
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            if should_stop():
                return None
            part = groups[start : start + _GROUPS_AT_ONCE]
            try:
                found = self._scorer.score_groups(part, should_stop)
            except StopAsked:
                return None
            for (_, answers), scores in zip(part, found, strict=True):
                scored.append(list(zip(answers, scores, strict=True)))
        for sentence in self._scorer.sentences():  # unjudged, or failed in custom code: each kind once
            if sentence not in self._said:
                self._said.add(sentence)
                print(f"warning: {sentence}; the completion counts as wrong", flush=True)
        return scored

    def read(self, samples: Samples, num_items: int) -> list[list[Completion]]:
        num = len(samples.lengths) // num_items
        rows = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)]
        completions = [
            Completion(self._form.said(text), int(length), not bool(ended))
            for text, length, ended in zip(
                decode(self.tokenizer, rows, self._ids.stops), samples.lengths, samples.ended, strict=True
            )
        ]
        return [completions[i * num : (i + 1) * num] for i in range(num_items)]

    def complete(
        self,
        items: Sequence[Item],
        num: int,
        temperature: float,
        seed: int,
        should_stop: ShouldStop,
        cut: Cut = WHOLE,
    ) -> list[Scored] | None:
        """Return `num` scored completions of each item, rollout.prompts_per_batch at a time without vLLM."""
        size = prompts_per_batch(self._config) or max(1, len(items))
        done: list[Scored] = []
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            samples = self.sample(batch, num, temperature, seed, should_stop, cut)
            scored = None if samples is None else self.score(batch, samples, should_stop)
            if scored is None:
                return None
            done += scored
        return done

    def demonstrated(self, task: Task, item: Item) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of a task's question and of a correct completion, with any thinking. The
        completion is empty if the task shows none."""
        for thinking in (True, False):
            try:
                shown = task.demonstration(item, thinking)
            except UsageError:
                continue
            end = special_ids(self.tokenizer, self._config.model).eos
            return self.prompt(item), (*encode(self.tokenizer, self._form.completion(shown)), end)
        return self.prompt(item), ()


@contextmanager
def open_judge(job: Job, zero_stage: int) -> Iterator[tuple[Judge, dict[str, Any]]]:
    """Yield the judge of the run's task, and the config.json of its model. `zero_stage` is the layout of the
    weights for engine.sync_weights; 0: complete on every rank."""

    def engine(hf_config: dict[str, Any], ids: SpecialIds) -> RolloutEngine:
        return build_rollout_engine(job, hf_config, ids, zero_stage)

    with judge_with(job.config, engine) as opened:
        for task in members(opened[0].task).values():
            for sentence in task.left_out() if isinstance(task, QuestionFile) else ():
                print(sentence, flush=True)
        yield opened


@contextmanager
def judge_with(
    config: RunConfig,
    build_engine: Callable[[dict[str, Any], SpecialIds], RolloutEngine],
    code: Path | None = None,
) -> Iterator[tuple[Judge, dict[str, Any]]]:
    """Do as open_judge, with the engine that `build_engine` makes of config.json and the special tokens."""
    tokenizer = load_tokenizer(config.model)
    benchmarks = Benchmarks.of(config) if config.stage in ("rl", "evaluate") else None
    task: Task
    if benchmarks is None or config.stage == "rl":
        task = make_task(config.task, code, fitting(config, code))
    else:
        task = benchmarks
    if benchmarks is None and config.stage in ("rl", "evaluate"):
        check_num_held_out(task, num_items(config))
    hf_config = load_model_config(config, vocabulary_size(tokenizer))
    ids = special_ids(tokenizer, config.model, code)
    engine = build_engine(hf_config, ids)
    longest = config.rollout.max_completion_length
    tasks = [task] if benchmarks in (None, task) else [task, benchmarks]
    with Scorer(config.reward, *tasks, max_completion_length=longest, code=code) as scorer:
        form = form_of(tokenizer, config.model, code)
        yield Judge(config, task, tokenizer, form, engine, scorer, ids, benchmarks), hf_config
