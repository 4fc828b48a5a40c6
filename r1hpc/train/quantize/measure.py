"""Measure a quantised export beside its original: size, perplexity, accuracy, speed.

r1hpc.export --quantize (unless --unmeasured) calls `export_measured`, which quantises (quantize.py), then
measures both. The questions are a run's held-out ones or its test files, in its prompt form, answered
greedily. The texts are questions of its task with the completions the task shows: held-out ones for the
perplexity, ones of the training part for calibration.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from r1hpc.base.files import write_json
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.schema.sections import MixConfig
from r1hpc.plan.model.weights import weight_files
from r1hpc.plan.topology.parts import num_items
from r1hpc.tasks.problems.benchmark import named_sets, with_counted_sets
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Item, Task
from r1hpc.tasks.rewards import Completion, Score
from r1hpc.tasks.statistics import Comparison, Verdict, compare_answers, judge_loss
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.tasks.text.tokenizer import as_trained, fitting
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.quantize.quantize import Quantized, load_folder, quantize
from r1hpc.train.rollout.judge import Judge, judge_with
from r1hpc.train.rollout.torch_engine import RolloutEngine, TorchSampler

_SEED = 0
_MOST_TEXTS = 256
_AT_ONCE = 32
RECORD = "r1hpc-quantization.json"


@dataclass(frozen=True)
class Measured:
    num_bytes: int
    perplexity: float
    num_tokens: int
    tokens_per_second: float
    """Over all answers together, decoded greedily by transformers on `device`."""
    device: str
    answers: list[dict[str, Any]]
    """A line per question, as compare_answers reads them."""


class Bench:
    """Runs one model after the other on the same questions; none stays loaded in between."""

    def __init__(self, config: RunConfig, judge: Judge, task: Task, device: torch.device) -> None:
        self._judge = judge
        self._task = task
        self.questions = ", ".join(named_sets(config)) or task.name
        """The test files, or the task."""
        self.device = device
        self._num_items = num_items(config)

    def measure(self, folder: Path) -> Measured:
        """Measure in fp32 on the CPU, in the folder's own precision on a GPU."""
        on_gpu = self.device.type == "cuda"
        network = load_folder(folder, self.device, "auto" if on_gpu else torch.float32)
        perplexity, num_tokens = self._perplexity(network)
        judge = self._judge
        judge.engine.sync_weights(network)
        items = [judge.evaluated.item(index, held_out=True) for index in range(self._num_items)]
        before_s = judge.sampling_s
        try:
            scored = judge.complete(items, 1, 0.0, _SEED, should_stop=lambda: False)
        finally:
            judge.engine.release()  # or both models would be in memory
        assert scored is not None, "nobody asks it to stop"
        answers = [_line(item, *one[0]) for item, one in zip(items, scored, strict=True)]
        speed = sum(line["greedy_length"] for line in answers) / (judge.sampling_s - before_s)
        size = sum(path.stat().st_size for path in weight_files(folder))
        return Measured(size, perplexity, num_tokens, speed, self.device.type, answers)

    def training_texts(self, num: int) -> list[list[int]]:
        """Return the token ids of `num` texts of the task's training part."""
        shown = (self._judge.demonstrated(self._task, self._task.item(index)) for index in range(num))
        return [[*prompt, *completion] for prompt, completion in shown]

    @torch.no_grad()
    def _perplexity(self, network: Any) -> tuple[float, int]:
        """Compute it over the completions' tokens, or the questions' if the task shows no completion."""
        there = self._task.num_questions(held_out=True)
        total, num = 0.0, 0
        for index in range(min(self._num_items, _MOST_TEXTS, there or _MOST_TEXTS)):
            item = self._task.item(index, held_out=True)
            prompt, completion = self._judge.demonstrated(self._task, item)
            ids = torch.tensor([*prompt, *completion], device=self.device)
            kept = len(completion) or len(prompt) - 1
            logits = network(input_ids=ids[None], use_cache=False).logits[0, -kept - 1 : -1].float()
            total += float(cross_entropy(logits, ids[-kept:], reduction="sum"))
            num += kept
        return math.exp(total / num), num


@contextmanager
def open_bench(
    config: RunConfig, folder: Path, code: Path | None = None, num_questions: int | None = None
) -> Iterator[Bench]:
    """Yield a bench for models of one tokenizer, that of `folder`, and the task of `config`, a run's. `code`
    is the run's frozen code, if it has any; `num_questions` is in place of its evaluate.num_items."""
    asked = _as_evaluation(config, folder, num_questions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def engine(hf_config: dict[str, Any], ids: SpecialIds) -> RolloutEngine:
        group = Group(0, 0, 1, device)
        return TorchSampler(group, ids, zero_stage=0, replica=torch.nn.Module, poll_every=1 << 30)

    with judge_with(asked, engine, code) as (judge, _):
        # For test files the judge knows no training part.
        task = make_task(asked.task, code, fitting(asked, code)) if named_sets(asked) else judge.task
        yield Bench(asked, judge, task, device)


def _as_evaluation(config: RunConfig, folder: Path, num_questions: int | None) -> RunConfig:
    """Return the run's configuration as that of an evaluation of the folder."""
    evaluate = config.evaluate
    if num_questions is not None:
        sets = {label: {**part, "num_items": num_questions} for label, part in evaluate.sets.items()}
        evaluate = replace(evaluate, num_items=num_questions, sets=sets)
    model = as_trained(config.model, folder)
    asked = replace(
        config,
        stage="evaluate",
        model=model,
        evaluate=evaluate,
        # The bench samples with torch even if the run used vLLM, and not all questions at once.
        rollout=replace(
            config.rollout, engine="sampler", prompts_per_batch=config.rollout.prompts_per_batch or _AT_ONCE
        ),
        data=replace(config.data, packing=False, validation_documents=0, mix=MixConfig()),  # of stage sft
        train=replace(config.train, early_stopping=0),
    )
    return with_counted_sets(asked)


def _line(item: Item, completion: Completion, score: Score) -> dict[str, Any]:
    return {
        "prompt": item.prompt,
        "expected": item.answer,
        "task": item.task,
        "greedy": completion.text,
        "greedy_correct": score.correct,
        "greedy_length": completion.num_tokens,
        "num_samples": 1,
        "num_correct": int(score.correct),
        "mean_length": float(completion.num_tokens),
    }


@dataclass(frozen=True)
class Asked:
    scheme: str
    """A key of quantize.SCHEMES."""
    num_texts: int = 0
    """Texts to calibrate on; 0: no calibration."""
    num_questions: int | None = None
    """None: as many as the run evaluates on."""
    margin: float = 0.02
    """Loss of accuracy to exclude, as a share of the questions."""


@dataclass(frozen=True)
class Report:
    asked: Asked
    questions: str
    quantized: Quantized
    before: Measured
    after: Measured
    comparison: Comparison
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return it without the answers."""
        found = self.comparison
        before, after = asdict(self.before), asdict(self.after)
        del before["answers"], after["answers"]
        return {
            **asdict(self.asked),
            **asdict(self.quantized),
            "original": before,
            "export": after,
            "questions": self.questions,
            "num_questions": found.num_questions,
            "accuracy": asdict(found.accuracy),
            "p_value": found.p_value,
            "no_worse": self.verdict.no_worse,
            "verdict": self.verdict.text,
        }


def export_measured(
    config: RunConfig, source: Path, folder: Path, asked: Asked, code: Path | None = None
) -> Report:
    """Quantise the model of `source` into `folder`, and run both on a run's questions; see open_bench."""
    with open_bench(config, source, code, asked.num_questions) as bench:
        texts = bench.training_texts(asked.num_texts) if asked.num_texts else None
        _say(f"making the weights {asked.scheme}" + (f", calibrated on {len(texts)} texts" if texts else ""))
        quantized = quantize(source, folder, asked.scheme, texts, bench.device)
        _say("asking the original")
        before = bench.measure(source)
        _say("asking the export")
        after = bench.measure(folder)
    comparison = compare_answers(before.answers, after.answers)
    verdict = judge_loss(comparison, asked.margin)
    report = Report(asked, bench.questions, quantized, before, after, comparison, verdict)
    write_json(folder / RECORD, report.to_json())
    return report


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
