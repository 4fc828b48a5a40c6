"""Answer held-out items or test files: greedily once, and several times at a temperature.

Stage evaluate runs this as its own job (generate.py). Stage rl runs it between updates, in parts; a finished
part survives a preemption, like a rollout's batches. Parts lie in rollouts/evaluation-<step>/ with the
policy's id until the evaluation is recorded in metrics/: a line in evaluation.jsonl, answers-<step>.jsonl and
transcripts-<step>.txt. `refuse_other_asking` refuses a resume that would ask something else than before, also
in stages traces and generate.
"""

import json
import shutil
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import append_record, read_json, write_atomic, write_json
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.topology.parts import evaluation_prompts, num_items
from r1hpc.tasks.grading.answers import counted_as
from r1hpc.tasks.problems.task import Item, members
from r1hpc.tasks.rewards import Completion, Score
from r1hpc.tasks.statistics import majority, pass_at_k, share_interval, wilson
from r1hpc.tasks.text.format import take_apart
from r1hpc.telemetry.records.evaluations import (
    OF_BEFORE,
    answers_path,
    evaluated_policies,
    sentence,
    table,
)
from r1hpc.train.loop.session import Job
from r1hpc.train.parallel.distributed import by_rank_0
from r1hpc.train.rollout.judge import Judge, ShouldStop
from r1hpc.train.rollout.torch_engine import Cut

_EVALUATION_SEED = 0x5EED
"""Evaluation samples are the same for every run, whatever train.seed is."""
_TELL_EVERY_S = 60.0
"""Seconds between progress lines of a long evaluation."""


@dataclass(frozen=True)
class Answer:
    """The model's answers to one item."""

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
    mean_length: float
    truncated: int
    num_thinking: int = 0
    """Samples with non-blank thinking, and how many of those are correct."""
    num_thinking_correct: int = 0
    task: str = ""
    """Label of its task or test file, if there are several."""
    votes: list[list[Any]] = field(default_factory=list)
    """[counted answer, whether it is right] of each sample, for maj@k; null: no answer."""


def answer(
    judge: Judge, config: RunConfig, indices: Sequence[int], should_stop: ShouldStop
) -> list[Answer] | None:
    """Answer held-out items, or questions of the test files, `indices`; None if a stop was requested."""
    items = [judge.evaluated.item(index, held_out=True) for index in indices]
    failpoint("evaluate.batch")
    greedy = judge.complete(items, 1, 0.0, _EVALUATION_SEED, should_stop)
    if greedy is None:
        return None
    # evaluate's own decoding, else the rollout's
    decoding: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        own = getattr(config.evaluate, name)
        decoding[name] = getattr(config.rollout, name) if own is None else own
    temperature, num = decoding.pop("temperature"), config.evaluate.num_samples
    sampled = judge.complete(items, num, temperature, _EVALUATION_SEED, should_stop, Cut(**decoding))
    if sampled is None:
        return None
    boxed, kinds = config.reward.answer_in == "boxed", members(judge.evaluated)
    return [
        _answer(item, kinds[item.task].judge, one[0], many, boxed)
        for item, one, many in zip(items, greedy, sampled, strict=True)
    ]


def _answer(
    item: Item,
    judge: str,
    greedy: tuple[Completion, Score],
    sampled: Sequence[tuple[Completion, Score]],
    boxed: bool,
) -> Answer:
    taken = [take_apart(completion.text, boxed=boxed) for completion, _ in sampled]
    verdicts = [score.correct for _, score in sampled]
    thinking = [right for parts, right in zip(taken, verdicts, strict=True) if (parts.thinking or "").strip()]
    return Answer(
        index=item.index,
        prompt=item.prompt,
        expected=item.answer,
        greedy=greedy[0].text,
        greedy_correct=greedy[1].correct,
        greedy_length=greedy[0].num_tokens,
        well_formed=greedy[1].well_formed,
        num_samples=len(sampled),
        num_correct=sum(verdicts),
        sample=sampled[0][0].text,
        mean_length=sum(completion.num_tokens for completion, _ in sampled) / len(sampled),
        truncated=sum(completion.truncated for completion, _ in sampled),
        num_thinking=len(thinking),
        num_thinking_correct=sum(thinking),
        task=item.task,
        votes=[
            [None if parts.answer is None else counted_as(parts.answer, judge, item.metadata), right]
            for parts, right in zip(taken, verdicts, strict=True)
        ],
    )


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return shares and means over the items with 95 % intervals, also per task or test file.

    A question drawn more than once counts each time in a share, but once for its interval.

    Returns: {num_items, num_questions (distinct), num_samples, greedy: {value, low, high}, pass_at: {"1":
    {...}, "2": ...}, maj_at: the same (None for older answers), well_formed, response_length,
    truncated_share, thinking_share, accuracy_given_thinking (None: no sample thinks), tasks: {label: the
    same} if there are labels}. Shares of thinking are over all samples.
    """
    summary = _summary_of(answers)
    labels = list(dict.fromkeys(a.task for a in answers if a.task))
    if labels:
        summary["tasks"] = {label: _summary_of([a for a in answers if a.task == label]) for label in labels}
    return summary


def _summary_of(answers: Sequence[Answer]) -> dict[str, Any]:
    num, num_samples = len(answers), answers[0].num_samples
    questions = [(a.prompt, a.expected, a.task) for a in answers]
    ks = [2**e for e in range(num_samples.bit_length())]
    thinking = sum(a.num_thinking for a in answers)
    pass_at = {}
    for k in ks:
        values = [pass_at_k(a.num_samples, a.num_correct, k) for a in answers]
        pass_at[str(k)] = _interval(*share_interval(values, num_samples, questions))
    voted = all(a.votes for a in answers)
    maj_at = {str(k): _share([majority(a.votes[:k]) for a in answers], questions) for k in ks if voted}
    return {
        "num_items": num,
        "num_questions": len(set(questions)),
        "num_samples": num_samples,
        "greedy": _share([a.greedy_correct for a in answers], questions),
        "pass_at": pass_at,
        "maj_at": maj_at if voted else None,
        "well_formed": sum(a.well_formed for a in answers) / num,
        "response_length": sum(a.mean_length for a in answers) / num,
        "truncated_share": sum(a.truncated for a in answers) / (num * num_samples),
        "thinking_share": thinking / (num * num_samples),
        "accuracy_given_thinking": (
            sum(a.num_thinking_correct for a in answers) / thinking if thinking else None
        ),
    }


def transcripts(answers: Sequence[Answer], most: int = 20) -> str:
    """Return questions and answers as text for people, the wrong ones first."""
    chosen = [a for a in answers if not a.greedy_correct][: most // 2]
    chosen += [a for a in answers if a.greedy_correct][: most - len(chosen)]
    blocks = []
    for a in chosen:
        verdict = "correct" if a.greedy_correct else f"WRONG, expected {a.expected}"
        blocks.append(
            f"--- item {a.index}: {verdict}; {a.num_correct} of {a.num_samples} samples correct\n"
            f"prompt  {a.prompt}\ngreedy  {a.greedy}\nsample  {a.sample}\n"
        )
    # Half a surrogate pair, which JSON may hold, is no UTF-8.
    return "\n".join(blocks).encode("utf-8", "backslashreplace").decode()


def _interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def _share(right: Sequence[bool], questions: Sequence[Hashable]) -> dict[str, float]:
    value, different = sum(right) / len(right), len(set(questions))
    return _interval(value, *wilson(value, different))


class HeldOut:
    def __init__(self, job: Job, judge: Judge, should_stop: ShouldStop) -> None:
        self._job = job
        self._judge = judge
        self._should_stop = should_stop

    def evaluate(self, network: torch.nn.Module, step: int) -> bool:
        """Record greedy and sampled answers to held-out items, once per step; False if a stop was requested.

        A record made with other weights is replaced: after a crash lost them, they may not come out the same.
        The newest line counts.
        """
        job, group = self._job, self._job.group
        known = by_rank_0(group, lambda: evaluated_policies(job.run).get(step))
        if known == OF_BEFORE:
            return True
        policy_id = self._judge.engine.sync_weights(network)
        if known == policy_id:
            self._judge.engine.release()
            return True
        answers = self._answers(step, policy_id)
        self._judge.engine.release()
        if answers is None:
            return False
        if group.rank == 0:
            self._record(step, policy_id, answers)
        return True

    def num_kept(self, step: int) -> int:
        """Return how many finished answers to the evaluation after `step` are on disk."""
        return sum(int(path.stem.rsplit("-", 1)[1]) for path in self._folder(step).glob("part-*.json"))

    def _answers(self, step: int, policy_id: str) -> list[Answer] | None:
        """Answer part by part, each on one rank; the result is the same on every rank."""
        group = self._job.group
        done = by_rank_0(group, lambda: self._already_done(step, policy_id))
        total = num_items(self._job.config)
        size = evaluation_prompts(self._job.config, group.world_size)
        cut = [range(start, min(start + size, total)) for start in range(0, total, size)]
        missing = [left for part in cut if (left := [index for index in part if index not in done])]
        fresh: list[Answer] = []
        stopped, told = False, time.monotonic()
        mine = missing[group.rank :: group.world_size]
        for number, part in enumerate(mine):
            if group.rank == 0 and time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                print(f"evaluation of step {step}: {number} of {len(mine)} batches", flush=True)
            made = answer(self._judge, self._job.config, part, self._should_stop)
            if made is None:
                stopped = True
                break
            self._folder(step).mkdir(mode=0o700, parents=True, exist_ok=True)
            content = {"policy": policy_id, "answers": [asdict(one) for one in made]}
            write_json(self._folder(step) / f"part-{part[0]:08d}-{len(part)}.json", content)
            fresh += made
        if group.all_sum([float(stopped)])[0]:
            return None
        for others in group.gather(fresh):
            done |= {one.index: one for one in others}
        return [done[index] for index in range(total)]

    def _already_done(self, step: int, policy_id: str) -> dict[int, Answer]:
        """Return the answers an earlier attempt got from this policy."""
        found: dict[int, Answer] = {}
        for path in sorted(self._folder(step).glob("part-*.json")):
            try:
                content = read_json(path)
            except R1hpcError:
                continue
            if content["policy"] == policy_id:
                found |= {line["index"]: Answer(**line) for line in content["answers"]}
        if found:
            print(f"evaluation of step {step}: {len(found)} answers were already there", flush=True)
        return found

    def _record(self, step: int, policy_id: str, answers: list[Answer]) -> None:
        job, summary = self._job, summarise(answers)
        line: dict[str, Any] = {"global_step": step, "attempt": job.attempt, "time": time.time()}
        line |= {"policy": policy_id, **summary}
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in answers)
        write_atomic(answers_path(job.run, step), lines)
        write_atomic(job.run.metrics / f"transcripts-{step:06d}.txt", transcripts(answers))
        append_record(job.run.rl_evaluations, line)
        shutil.rmtree(self._folder(step), ignore_errors=True)
        each = table(summary) if len(summary.get("tasks", {})) > 1 else []
        print("\n".join([f"step {step}: {sentence(summary)}", *each]), flush=True)

    def _folder(self, step: int) -> Path:
        return self._job.run.rollouts / f"evaluation-{step:08d}"


@dataclass(frozen=True)
class Asking:
    """Ids by content of what a run asks, as far as each matters and is known."""

    task: str
    form: str | None = None
    """Prompt template, tokenizer and end tokens: tasks.text.tokenizer.asking_id."""
    weights: str | None = None
    """The model's weights, if a single model answers."""


def refuse_other_asking(
    job: Job, record: Path, asking: Asking, since: str, has_kept: Callable[[], bool]
) -> None:
    """Record in `record` what is asked, and refuse any change once there are answers. On every rank.

    Args:
        asking: as rank 0 has it; facts that an earlier attempt did not know are added.
        since: the event from which on answers are kept, for the error.
        has_kept: True if anything is kept; called on rank 0. Until then changes are allowed.
    """

    def note() -> tuple[dict[str, str], dict[str, str]]:
        now = {name: value for name, value in asdict(asking).items() if value is not None}
        before = read_json(record) if record.exists() and has_kept() else {}
        noted = {**now, **before}
        if noted != before:
            record.parent.mkdir(mode=0o700, exist_ok=True)
            write_json(record, noted)
        return now, noted

    now, noted = by_rank_0(job.group, note)
    changed = [name for name in now if noted[name] != now[name]]
    if changed:
        path, before = job.config.model.path, noted[changed[0]]
        what = {
            "task": f"the questions have changed since {since}, from {before} to {now[changed[0]]}",
            "form": f"the prompts for {path} have changed since {since}: tokenizer, template or end tokens",
            "weights": f"the weights in {path} have changed since {since}",
        }[changed[0]]
        raise UsageError(f"{what}: put the files back, or begin a new run (--run-name)")
