"""Run a teacher in this process: prompts in, completions out, each with a verdict and the rule that drops it.

    teacher = load_teacher(folder, generate)
    for said in teacher.ask(128, rows): ...         # all completions of each prompt, in order

It uses the prompt form, sampler and verifier of stage generate. A completion's random stream is a function of
seed, prompt number and its own number; the recipe fixes which ones are decoded together. On a CPU one thread
computes, so that sums are the same on any machine of one kind. On GPUs the weights keep the folder's
precision, and two runs may differ in a word.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json
from r1hpc.config.schema.rl import RewardConfig, RolloutConfig
from r1hpc.config.schema.run import OWN_ATTENTIONS, ModelConfig, RunConfig
from r1hpc.corpus.engine.units import worker_number
from r1hpc.corpus.recipe.stages import GenerateRecipe
from r1hpc.corpus.sources.prompts import Row, teacher_state
from r1hpc.plan.model.shape import load_model_config
from r1hpc.tasks.problems.file import Columns, judge_of, to_question
from r1hpc.tasks.problems.task import Item, fill
from r1hpc.tasks.reward.rewards import Score, Scorer
from r1hpc.tasks.text.tokenizer import SpecialIds, form_of, load_tokenizer, special_ids, vocabulary_size
from r1hpc.train.generate.generate import kept
from r1hpc.train.model.model import build_model
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.rollout.sampler import Asker, Scored
from r1hpc.train.rollout.torch_engine import Cut, Samples, TorchSampler

TRUNCATED = "generate.truncated"
EMPTY = "generate.empty"
REPEATED = "generate.repeated"
PASS_RATE = "generate.pass_rate"
WRONG = "generate.wrong"
NOT_BEST = "generate.not_best"
_ANY_LENGTH = 2**31
_UNJUDGED = Score(0.0, {}, correct=False, well_formed=False)


@dataclass(frozen=True)
class Said:
    """One completion of one prompt."""

    question: str
    prompt: str
    """The prompt as asked: the question in its template, before the chat template."""
    text: str
    item: int
    sample: int
    num_tokens: int
    rule: str = ""
    value: float | None = None
    correct: bool | None = None
    reward: float | None = None
    pass_rate: float | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """Return its record, without its place."""
        return {name: value for name, value in vars(self).items() if name not in ("question", "text")}


class Prompts:
    """The prompts of a source, with the verifier's data."""

    judge_settings: Mapping[str, Any] = {}

    def __init__(self, generate: GenerateRecipe) -> None:
        self._generate = generate
        self._columns = Columns(generate.prompt, generate.answer or "", generate.choices)
        self.judge = judge_of(self._columns) if generate.answer else ""

    def to_item(self, number: int, row: Row) -> tuple[str, Item]:
        """Return the question with that number in its file, and its item.

        Raises:
            UsageError: its answer is not valid; names the line.
        """
        where, columns = row
        generate = self._generate
        if generate.answer is None:
            text: str = columns[generate.prompt]
            return text, Item(number, fill(generate.template, text), "")
        question = to_question(where, columns, self._columns)
        asked = fill(generate.template, question.text)
        return question.text, Item(number, asked, question.answer, question.metadata())


class Teacher:
    """Holds the model of a folder, samples completions and has them verified if there are right answers."""

    def __init__(self, folder: Path, generate: GenerateRecipe) -> None:
        """Raise ConfigError or UsageError where the folder cannot be used."""
        self._generate, self._prompts = generate, Prompts(generate)
        config = _config(folder, generate)
        tokenizer = load_tokenizer(config.model)
        hf_config = load_model_config(config, vocabulary_size(tokenizer))
        self._most_tokens = int(hf_config.get("max_position_embeddings") or _ANY_LENGTH)
        ids = special_ids(tokenizer, config.model)
        self._asker = Asker(
            config,
            tokenizer,
            form_of(tokenizer, config.model),
            _engine(config, hf_config, ids),
            _scorer(generate, self._prompts),
            ids,
        )

    def ask(self, first: int, rows: Sequence[Row]) -> list[list[Said]]:
        """Return all completions of each of these prompts, which are decoded together.

        Args:
            first: the number of the first in its file.

        Raises:
            UsageError: an invalid answer, or a prompt that is too long or cannot be encoded.
        """
        asked = [self._prompts.to_item(number, row) for number, row in enumerate(rows, first)]
        items = [item for _, item in asked]
        self._check_lengths(items, rows)
        samples = self._sample(items)
        if self._generate.answer is not None:
            answers = self._asker.score(items, samples, _never)
            assert answers is not None, "nobody asks it to stop"
        else:
            answers = [[(each, _UNJUDGED) for each in read] for read in self._asker.read(samples, len(items))]
        return [self._said(*each, scored) for each, scored in zip(asked, answers, strict=True)]

    def _sample(self, items: Sequence[Item]) -> Samples:
        generate = self._generate
        cut = Cut(generate.top_p, generate.top_k, generate.min_p)
        asked = (generate.num_samples, generate.temperature, generate.seed)
        with _one_thread():
            samples = self._asker.sample(items, *asked, _never, cut)
        assert samples is not None, "nobody asks it to stop"
        return samples

    def _check_lengths(self, items: Sequence[Item], rows: Sequence[Row]) -> None:
        for item, (where, _) in zip(items, rows, strict=True):
            length = len(self._asker.prompt(item))
            if length + self._generate.max_completion_length > self._most_tokens:
                raise UsageError(
                    f"{where}: a prompt of {length} tokens and generate.max_completion_length "
                    f"{self._generate.max_completion_length} exceed the {self._most_tokens} tokens "
                    "that the teacher reads; lower the one or shorten the other"
                )

    def _said(self, question: str, item: Item, scored: Scored) -> list[Said]:
        rate = sum(score.correct for _, score in scored) / len(scored)
        rules, is_judged = left_out(scored, rate, self._generate), self._generate.answer is not None
        return [
            Said(
                *(question, item.prompt, completion.text, item.index, sample, completion.num_tokens, rule),
                value=rate if rule == PASS_RATE else None,
                correct=score.correct if is_judged else None,
                reward=score.reward if is_judged else None,
                pass_rate=rate if is_judged else None,
            )
            for sample, ((completion, score), rule) in enumerate(zip(scored, rules, strict=True))
        ]


def left_out(scored: Scored, rate: float, generate: GenerateRecipe) -> list[str]:
    """Return for each completion of a prompt the rule that drops it; empty if kept, as in stage generate."""
    if generate.answer is not None and not generate.min_pass_rate <= rate <= generate.max_pass_rate:
        return [PASS_RATE] * len(scored)
    chosen = {id(completion) for completion, _ in kept(scored, generate.keep)}
    return [
        "" if id(completion) in chosen else _why(scored, sample, generate.keep)
        for sample, (completion, _) in enumerate(scored)
    ]


def _why(scored: Scored, sample: int, keep: str) -> str:
    completion, score = scored[sample]
    if completion.truncated:
        return TRUNCATED
    if not completion.text:
        return EMPTY
    if keep != "all" and not (score.correct and score.well_formed):
        return WRONG
    later = scored[sample + 1 :]
    is_repeated = any(c.text == completion.text and not c.truncated for c, _ in later)
    return REPEATED if is_repeated else NOT_BEST


def load_teacher(folder: Path, generate: GenerateRecipe) -> Teacher:
    """Return the teacher of a folder with its verifier, loaded once per process."""
    return _loaded(folder, tuple(map(tuple, teacher_state(folder))), generate)


_kept: tuple[Any, Teacher] | None = None
"""The last teacher of this process, and the arguments it was loaded for."""


def _loaded(*key: Any) -> Teacher:
    global _kept
    if _kept is None or _kept[0] != key:
        _kept = None  # before loading the next: two may not fit
        gc.collect()  # a teacher refers to itself
        folder, _, generate = key
        _kept = key, Teacher(folder, generate)
    return _kept[1]


def _engine(config: RunConfig, hf_config: dict[str, Any], ids: SpecialIds) -> TorchSampler:
    logging.disable_progress_bar()
    group = Group(0, 0, 1, _device())
    network = build_model(config.model, hf_config, 0, Placement(_dtype(hf_config), group.device)).eval()
    engine = TorchSampler(group, ids, zero_stage=0, replica=lambda: network)
    engine.sync_weights(network)
    return engine


def _scorer(generate: GenerateRecipe, prompts: Prompts) -> Scorer | None:
    """Return the scorer; None without answers to compare with."""
    if generate.answer is None:
        return None
    reward = RewardConfig(answer_in=generate.answer_in)
    return Scorer(reward, prompts, max_completion_length=generate.max_completion_length)


def _config(folder: Path, generate: GenerateRecipe) -> RunConfig:
    """Return the configuration of an equivalent run of stage generate."""
    attention = read_json(folder / "config.json").get("attn_implementation")
    model = ModelConfig(
        path=str(folder),
        attn_implementation=attention if attention in OWN_ATTENTIONS else "sdpa",
        chat_template=generate.chat_template,
        system_prompt=generate.system_prompt,
        open_thinking=generate.open_thinking,
    )
    rollout = RolloutConfig(
        max_prompt_length=_ANY_LENGTH, max_completion_length=generate.max_completion_length
    )
    return RunConfig(stage="generate", model=model, rollout=rollout)


def _device() -> torch.device:
    """Return a GPU for each worker of this machine, in turn; a CPU if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.device("cuda", worker_number() % count) if count else torch.device("cpu")


def _dtype(hf_config: Mapping[str, Any]) -> torch.dtype:
    """Return the folder's dtype on a GPU, fp32 on a CPU."""
    named = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    dtype: torch.dtype = getattr(torch, named) if torch.cuda.is_available() else torch.float32
    return dtype


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one CPU thread; code that waits for a GPU needs no more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _never() -> bool:
    return False
