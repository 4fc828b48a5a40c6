"""Run the stages without optimizer steps: traces, generate and evaluate. Each is cut into parts of items.

A part is one file, parts/part-<n>.jsonl, written atomically. The ranks share the parts; a resume makes only
missing ones. A part's content does not depend on the rank, so the number of ranks may change. evaluate.py
answers the items of an evaluation; `contamination` looks for its questions in the training data.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from r1hpc.attempt.workload import Outcome
from r1hpc.base.errors import StateError
from r1hpc.base.files import open_plain, parse_object, write_atomic, write_json
from r1hpc.config.schema.run import RunConfig
from r1hpc.corpus.clean.contamination import NGRAM, overlap
from r1hpc.corpus.sources.lines import iter_lines
from r1hpc.plan.topology.parts import num_parts, part_items
from r1hpc.tasks.grading.verifier import StopAsked
from r1hpc.tasks.problems.asked_items import demonstrate
from r1hpc.tasks.problems.benchmark import Benchmarks, check_trained_on, training_files
from r1hpc.tasks.problems.file import table_batches
from r1hpc.tasks.problems.registry import make_task
from r1hpc.tasks.problems.task import Task
from r1hpc.tasks.rewards import Completion, Score
from r1hpc.telemetry.records.evaluations import table
from r1hpc.train.generate.evaluate import Answer, Asking, answer, refuse_other_asking, summarise, transcripts
from r1hpc.train.loop.session import Job
from r1hpc.train.model.model import build_model
from r1hpc.train.parallel.distributed import by_rank_0
from r1hpc.train.parallel.engine import check_precision
from r1hpc.train.rollout.judge import Judge, Scored, open_judge
from r1hpc.train.rollout.policy import placement
from r1hpc.train.rollout.torch_engine import Cut

Lines = list[dict[str, Any]]

_LINES_A_BEAT = 1000
_VISIBLE_S = 180.0
"""Seconds until a file written on another node is listed here: NFS caches a listing for up to a minute."""


def traces(job: Job) -> Outcome:
    """Write demonstrations, some with thinking, for a cold start. Only items of the training part are used.
    Needs no model and no GPU: the task knows the answers."""
    task = make_task(job.config.task)
    _refuse_other(job, Asking(task.id))
    outcome = _run_parts(job, functools.partial(_demonstrations, job, task))

    def write() -> bool:
        count = _write_lines(job.run.traces, _read_parts(job))
        print(f"{count} traces of {task.name} in {job.run.traces}", flush=True)
        return True

    return _last_by_rank_0(job, outcome, write)


def generate(job: Job) -> Outcome:
    """Sample the model's completions and keep those that pass the verifier (rejection sampling).

    Kept per item: all correct ones, the correct one of highest reward, or everything (generate.keep,
    most_per_item). An item is left out if its pass rate is above generate.max_pass_rate or below
    min_pass_rate.
    """
    with _judge_of_model(job) as (judge, weights):
        _refuse_other(job, Asking(judge.task.id, judge.asking_id, weights))
        outcome = _run_parts(job, functools.partial(_completions, job, judge))

    def write() -> bool:
        lines = list(_read_parts(job))
        _write_lines(job.run.traces, lines)
        print(f"{sentence_on_kept(job.config, lines)}: {job.run.traces}", flush=True)
        return True

    return _last_by_rank_0(job, outcome, write)


def evaluate(job: Job) -> Outcome:
    """Judge the model of `model.path` on held-out items or test files, as a separate job."""
    check_trained_on(job.config)
    with _judge_of_model(job) as (judge, weights):
        task_id = judge.evaluated.id
        _refuse_other(job, Asking(task_id, judge.asking_id, weights))
        outcome = _run_parts(job, functools.partial(_answers, job, judge))
    return _last_by_rank_0(job, outcome, functools.partial(_sum_up, job, task_id))


def _sum_up(job: Job, task_id: str) -> bool:
    """Write the summary of all parts' answers. False if a stop was requested before the search for the
    questions in the training data was done."""
    answers = [Answer(**line) for line in _read_parts(job)]
    summary = {"task": task_id, "model": job.config.model.path, **summarise(answers)}
    asked = job.config.evaluate
    # Write it before a search that may take hours, as if nothing was searched.
    if asked.not_searched or asked.trained_on:
        summary["not_searched"] = [*asked.not_searched, *asked.trained_on]
    write_json(job.run.evaluation, summary)
    write_atomic(job.run.transcripts, transcripts(answers))
    try:
        damaged: list[str] = []
        found = contamination(job.config, functools.partial(_go_on_reading, job), damaged.append)
    except StopAsked:
        return False
    summary.pop("not_searched", None)
    summary |= {"contamination": found} if found is not None else {}
    not_searched = [*asked.not_searched, *damaged]
    summary |= {"not_searched": not_searched} if not_searched else {}
    write_json(job.run.evaluation, summary)
    print("\n".join(table(summary)), flush=True)
    return True


def _go_on_reading(job: Job) -> None:
    job.watchdog.beat("reading what it was trained on")
    if job.requests.poll()[0]:
        raise StopAsked


def _last_by_rank_0(job: Job, outcome: Outcome, work: Callable[[], bool]) -> Outcome:
    """Return the outcome once rank 0 has done the last work of a stage, which returns False if it had to
    stop. The others wait: srun gives a rank left alone ten minutes, and the stage is not finished without it.
    """
    if not outcome.finished:
        return outcome
    if job.group.broadcast(job.group.rank != 0 or work()):
        return outcome
    return replace(outcome, finished=False, reason=job.stop_reason())


@contextmanager
def _judge_of_model(job: Job) -> Iterator[tuple[Judge, str | None]]:
    """Yield a judge over the model of `model.path`, loaded on every rank, and the id of its weights: None if
    it was not loaded, as all parts are made."""
    config, weights = job.config, None
    check_precision(config.train)
    with open_judge(job, zero_stage=0) as (judge, hf_config):
        if _missing(job):
            job.watchdog.beat("loading the model")
            place = placement(config, job.group, divided=False)
            network = build_model(config.model, hf_config, config.train.seed, place).eval()
            weights = judge.engine.sync_weights(network)
        yield judge, weights


def _demonstrations(job: Job, task: Task, number: int) -> Lines:
    lines = []
    for index in part_items(job.config, number):
        shown = demonstrate(task, job.config, index)
        line = {"prompt": shown.item.prompt, "completion": shown.completion}
        lines.append({**line, "item": index, "thinking": shown.thinking})
    return lines


def _completions(job: Job, judge: Judge, number: int) -> Lines | None:
    config = job.config
    items = [judge.task.item(i, config.generate.held_out) for i in part_items(config, number)]
    completed = judge.complete(
        items,
        config.generate.num_samples,
        config.rollout.temperature,
        config.train.seed,
        functools.partial(_stop_requested, job),
        Cut(config.rollout.top_p, config.rollout.top_k, config.rollout.min_p),
    )
    if completed is None:
        return None
    lines: Lines = []
    for item, answers in zip(items, completed, strict=True):
        rate = sum(score.correct for _, score in answers) / len(answers)
        if config.generate.min_pass_rate <= rate <= config.generate.max_pass_rate:
            chosen = kept(answers, config.generate.keep)[: config.generate.most_per_item]
            for completion, score in chosen:
                line = {"prompt": item.prompt, "completion": completion.text, "tokens": completion.num_tokens}
                line |= {"item": item.index, "correct": score.correct, "reward": score.reward}
                lines.append({**line, "pass_rate": rate})
    return lines


def kept(answers: Sequence[tuple[Completion, Score]], keep: str) -> Scored:
    """Return one item's answers that are kept, in order: equal texts once, truncated ones never.

    Of equally good ones `best` takes the first. Ties are common with rewards of 0 and 1, and any rule on the
    text would train that rule: picking the shortest, for example, would train the model to think least.
    """
    different = {c.text: (c, s) for c, s in answers if not c.truncated and c.text}
    chosen = list(different.values())
    if keep == "all":
        return chosen
    correct = [(c, s) for c, s in chosen if s.correct and s.well_formed]
    return correct if keep == "correct" else sorted(correct, key=lambda a: -a[1].reward)[:1]


def sentence_on_kept(config: RunConfig, lines: Lines) -> str:
    """Return a sentence on how many completions stage generate keeps, and how many of those are right."""
    asked, right = config.generate, sum(line["correct"] for line in lines)
    return (
        f"{len(lines)} completions kept of {asked.num_items} items x {asked.num_samples} samples, "
        f"{right} of them right (generate.keep={asked.keep})"
    )


def _answers(job: Job, judge: Judge, number: int) -> Lines | None:
    items = part_items(job.config, number)
    answers = answer(judge, job.config, items, functools.partial(_stop_requested, job))
    return None if answers is None else [asdict(one) for one in answers]


def _refuse_other(job: Job, asking: Asking) -> None:
    record = job.run.parts / "questions.json"
    refuse_other_asking(job, record, asking, "the first part was made", lambda: bool(job.run.all_parts))


def _run_parts(job: Job, make_part: Callable[[int], Lines | None]) -> Outcome:
    """Make every missing part; FINISHED when none is missing. `make_part` returns None if it had to stop."""
    group, parts = job.group, num_parts(job.config)
    if group.rank == 0:
        job.run.parts.mkdir(mode=0o700, exist_ok=True)
    missing = _missing(job)
    if group.rank == 0:
        print(f"{parts - len(missing)} of {parts} parts are done", flush=True)
    made: list[int] = []
    for number in missing[group.rank :: group.world_size]:
        job.watchdog.beat(f"part {number}")
        lines = None if _stop_requested(job) else make_part(number)
        if lines is None:
            break
        _write_lines(_part_path(job, number), lines)
        made.append(number)
    # The ranks report what they made: NFS caches for a while that another node's file was missing.
    left = len(missing) - sum(map(len, group.gather(made)))
    reason = job.stop_reason()
    return Outcome(left == 0, parts - left, parts - left or None, reason if left else "")


def _missing(job: Job) -> list[int]:
    """Return the parts that are not made, the same on all ranks."""
    # A metadata server notices when every rank asks for every file.
    return by_rank_0(job.group, lambda: _not_listed(job))


def _read_parts(job: Job) -> Iterator[dict[str, Any]]:
    """Yield the lines of all parts, in order; raise StateError if a part is missing or damaged."""
    # Every part that a rank has reported must be visible here too.
    deadline = time.monotonic() + _VISIBLE_S
    while unseen := _not_listed(job):
        job.watchdog.beat("waiting for the parts of other nodes")
        if time.monotonic() > deadline:
            raise StateError(
                f"{len(unseen)} parts of other nodes are not seen here after {_VISIBLE_S:.0f} s, first "
                f"{_part_path(job, unseen[0])}: resume to make the missing ones again"
            )
        time.sleep(1.0)
    for part in range(num_parts(job.config)):
        path = _part_path(job, part)
        with open_plain(path) as file:
            for number, line in enumerate(file, 1):
                record = parse_object(line)
                if record is None:
                    raise StateError(f"{path}:{number} is damaged: remove {path.name}, and it is made again")
                yield record


def _not_listed(job: Job) -> list[int]:
    """Return the parts not in the listing; looking up names fails, since NFS caches a missing name."""
    there: set[str] = set()
    with suppress(FileNotFoundError):  # before the first one
        there = set(os.listdir(job.run.parts))  # noqa: PTH208
    return [n for n in range(num_parts(job.config)) if _part_path(job, n).name not in there]


def _part_path(job: Job, number: int) -> Path:
    return job.run.parts / f"part-{number:06d}.jsonl"


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> int:
    texts = [json.dumps(line) + "\n" for line in lines]
    write_atomic(path, "".join(texts))
    return len(texts)


def _stop_requested(job: Job) -> bool:
    """True if this rank was asked to stop. Also beats the watchdog."""
    job.watchdog.beat("making a part")
    return job.requests.poll()[0]


def contamination(
    config: RunConfig,
    beat: Callable[[], None] = lambda: None,
    not_read: Callable[[str], object] = lambda sentence: None,
) -> dict[str, Any] | None:
    """Return how many questions of each test file occur in evaluate.trained_on; None without either.

    By file, for questions long enough to search: {num_questions, num_found, share, ngram, num_too_short}. For
    multiple choice only the question is searched, as its choices are laid out differently elsewhere. `beat`
    is called while it reads, which may take hours, `not_read` with each part of a file that could not be
    read.
    """
    benchmarks = Benchmarks.of(config)
    if benchmarks is None or not config.evaluate.trained_on:
        return None
    questions = {
        label: [each.alone for each in benchmark.questions[: benchmarks.sizes[label]]]
        for label, benchmark in benchmarks.members.items()
    }
    every = [text for texts in questions.values() for text in texts]
    found = iter(overlap(every, _texts(config, beat, not_read)))
    report = {}
    for label, texts in questions.items():
        hits = [hit for hit in islice(found, len(texts)) if hit is not None]
        report[label] = {
            "num_questions": len(hits),
            "num_found": sum(hits),
            "share": sum(hits) / len(hits) if hits else None,
            "ngram": NGRAM,
            "num_too_short": len(texts) - len(hits),
        }
    return report


def _texts(config: RunConfig, beat: Callable[[], None], not_read: Callable[[str], object]) -> Iterator[str]:
    """Yield every record of the training files, with all its strings as one text."""
    for path in config.evaluate.trained_on:
        tables, files = training_files(path)
        for each in tables:
            for rows in table_batches(each):
                beat()
                yield from ("\n".join(_strings(row)) for row in rows)
        for file in files:
            for number, line in enumerate(iter_lines(file, 0, None)):
                if number % _LINES_A_BEAT == 0:
                    beat()
                if line.fault:
                    not_read(f"{file} at byte {line.position:,}: {line.fault}")
                try:
                    record = json.loads(line.raw)
                except (ValueError, RecursionError):
                    record = line.raw.decode("utf-8", "replace")
                yield "\n".join(_strings(record))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | Sequence) and not isinstance(value, bytes):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(inner)
