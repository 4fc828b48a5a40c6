"""From a task's items to judged completions: encode the prompts, sample, have the verifier score.

    with open_judge(job, zero_stage=0) as judge:
        judge.engine.sync_weights(network)                         # all ranks together
        samples = judge.sample(items, 4, 1.0, seed, should_stop)   # None when a stop was requested
        scored = judge.score(items, samples, should_stop)

What rollouts, evaluations and rejection sampling share. `should_stop` is looked at in between, so that a rank
that was asked to stop does so within seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import tokenizers

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema import RunConfig
from r1hpc.plan.model import load_model_config
from r1hpc.tasks.registry import make_task
from r1hpc.tasks.rewards import Completion, Score, Scorer
from r1hpc.tasks.task import Item, Task, check_num_held_out
from r1hpc.tasks.tokenizer import encode, load_tokenizer, special_ids
from r1hpc.train import loop
from r1hpc.train.loop import Job
from r1hpc.train.policy import build_rollout_engine
from r1hpc.train.sampling import Request, RolloutEngine, Samples, streams

_GROUPS_AT_ONCE = 16
"""Groups scored between two looks at should_stop."""

Scored = list[tuple[Completion, Score]]
"""The completions of one item with their scores."""
ShouldStop = Callable[[], bool]


class Judge:
    """Asks the model whose weights the engine holds, and scores what it says."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        tokenizer: tokenizers.Tokenizer,
        engine: RolloutEngine,
        scorer: Scorer,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.engine = engine
        self._config = config
        self._scorer = scorer
        self._encode = lru_cache(maxsize=4096)(self._encoded)

    def prompt(self, item: Item) -> tuple[int, ...]:
        """The prompt's tokens.

        Raises:
            ConfigError: longer than rollout.max_prompt_length.
            UsageError: a character that the vocabulary lacks.
        """
        return self._encode(item.prompt)

    def sample(
        self, items: Sequence[Item], num: int, temperature: float, seed: int, should_stop: ShouldStop
    ) -> Samples | None:
        """`num` completions of each item, all decoded together; None when a stop was requested."""
        request = Request(
            prompts=[self.prompt(item) for item in items],
            streams=streams(seed, [item.index for item in items], num),
            num_generations=num,
            max_completion_length=self._config.rollout.max_completion_length,
            temperature=temperature,
        )
        return self.engine.sample(request, should_stop)

    def score(self, items: Sequence[Item], samples: Samples, should_stop: ShouldStop) -> list[Scored] | None:
        """The completions of each item with their scores; None when a stop was requested."""
        num = len(samples.lengths) // len(items)
        rows = [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths, strict=True)]
        completions = [
            Completion(text, int(length), not bool(ended))
            for text, length, ended in zip(
                self.tokenizer.decode_batch(rows), samples.lengths, samples.ended, strict=True
            )
        ]
        groups = [(item, completions[i * num : (i + 1) * num]) for i, item in enumerate(items)]
        scored: list[Scored] = []
        for start in range(0, len(groups), _GROUPS_AT_ONCE):
            if should_stop():
                return None
            part = groups[start : start + _GROUPS_AT_ONCE]
            for (_, answers), scores in zip(part, self._scorer.score_groups(part), strict=True):
                scored.append(list(zip(answers, scores, strict=True)))
        return scored

    def complete(
        self, items: Sequence[Item], num: int, temperature: float, seed: int, should_stop: ShouldStop
    ) -> list[Scored] | None:
        """`num` scored completions of each item, rollout.prompts_per_batch items at a time."""
        size = self._config.rollout.prompts_per_batch or max(1, len(items))
        done: list[Scored] = []
        for start in range(0, len(items), size):
            batch = items[start : start + size]
            samples = self.sample(batch, num, temperature, seed, should_stop)
            scored = None if samples is None else self.score(batch, samples, should_stop)
            if scored is None:
                return None
            done += scored
        return done

    def _encoded(self, text: str) -> tuple[int, ...]:
        ids, most = tuple(encode(self.tokenizer, text)), self._config.rollout.max_prompt_length
        if len(ids) > most:
            raise ConfigError(f"a prompt has {len(ids)} tokens: raise rollout.max_prompt_length, now {most}")
        return ids


@contextmanager
def open_judge(job: Job, zero_stage: int) -> Iterator[tuple[Judge, dict[str, Any]]]:
    """The judge of the run's task, and the config.json of the model it will ask.

    Args:
        zero_stage: how the weights lie that engine.sync_weights will be given; 0: whole on every rank.

    Raises:
        ConfigError: more held-out items are to be asked than the task has.
    """
    config = job.config
    tokenizer = load_tokenizer(config.model)
    task = make_task(config.task)
    if config.stage in ("rl", "evaluate"):
        check_num_held_out(task, config.evaluate.num_items)
    hf_config = load_model_config(config, tokenizer.get_vocab_size())
    engine = build_rollout_engine(job, hf_config, special_ids(tokenizer, config.model), zero_stage)
    longest = config.rollout.max_completion_length
    flops = loop.model_flops_per_token(hf_config, longest)
    with Scorer(config.reward, task, max_completion_length=longest, flops_per_token=flops) as scorer:
        yield Judge(config, task, tokenizer, engine, scorer), hf_config
