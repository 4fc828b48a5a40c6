"""Evaluations inside an RL run, in parts: a finished part survives a preemption, as a rollout's batches do.

    held_out = HeldOut(job, evaluator, engine, should_stop)
    held_out.evaluate(network, step)        # on every rank; False when asked to leave

Answers lie in rollouts/evaluation-<step>/ with the name of the policy that gave them until the evaluation is
on record; then in metrics/: a line in evaluation.jsonl, answers-<step>.jsonl and transcripts-<step>.txt.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import append_record, read_json, write_json
from r1hpc.telemetry.evaluations import answers_path, evaluations_path, read_evaluations, sentence
from r1hpc.train.evaluate import Answer, Evaluator, summarise, transcripts
from r1hpc.train.loop import Job
from r1hpc.train.parts import write_lines
from r1hpc.train.sampling import RolloutEngine


class HeldOut:
    """Judges the policy at chosen steps."""

    def __init__(
        self, job: Job, evaluator: Evaluator, engine: RolloutEngine, should_stop: Callable[[], bool]
    ) -> None:
        self._job = job
        self._evaluator = evaluator
        self._engine = engine
        self._should_stop = should_stop

    def evaluate(self, network: torch.nn.Module, step: int) -> bool:
        """Greedy and sampled answers to held-out items, on record once per step; False: asked to leave."""
        job, group = self._job, self._job.group
        if group.broadcast(step in read_evaluations(job.run)):
            return True
        policy_id = self._engine.sync_weights(network)
        answers = self._answers(step, policy_id)
        self._engine.release()
        if answers is None:
            return False
        if group.rank == 0:
            self._put_on_record(step, answers)
        return True

    def num_kept(self, step: int) -> int:
        """How many answers to the evaluation after `step` lie finished on disk."""
        return sum(int(path.stem.rsplit("-", 1)[1]) for path in self._folder(step).glob("part-*.json"))

    def _answers(self, step: int, policy_id: str) -> list[Answer] | None:
        """Part by part, each by one rank; the same on every rank."""
        group, setting = self._job.group, self._job.config.evaluate
        done: dict[int, Answer] = group.broadcast(self._already_done(step, policy_id))
        share = -(-setting.num_items // group.world_size)
        size = min(self._job.config.rollout.prompts_per_batch or share, share)
        cut = [
            range(start, min(start + size, setting.num_items)) for start in range(0, setting.num_items, size)
        ]
        missing = [left for part in cut if (left := [index for index in part if index not in done])]
        fresh: list[Answer] = []
        asked_to_leave = False
        for turn, part in enumerate(missing):
            if turn % group.world_size != group.rank:
                continue
            made = self._evaluator.answer(part, setting.num_samples, self._should_stop)
            if made is None:
                asked_to_leave = True
                break
            self._folder(step).mkdir(mode=0o700, parents=True, exist_ok=True)
            content = {"policy": policy_id, "answers": [answer.to_json() for answer in made]}
            write_json(self._folder(step) / f"part-{part[0]:08d}-{len(part)}.json", content)
            fresh += made
        if group.all_sum([float(asked_to_leave)])[0]:
            return None
        for others in group.gather(fresh):
            done |= {answer.index: answer for answer in others}
        return [done[index] for index in range(setting.num_items)]

    def _already_done(self, step: int, policy_id: str) -> dict[int, Answer]:
        """Answers that an earlier attempt had from this very policy; read by rank 0."""
        if self._job.group.rank != 0:
            return {}
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

    def _put_on_record(self, step: int, answers: list[Answer]) -> None:
        job, summary = self._job, summarise(answers)
        line: dict[str, Any] = {"global_step": step, "attempt": job.attempt, "time": time.time(), **summary}
        write_lines(answers_path(job.run, step), [answer.to_json() for answer in answers])
        (job.run.metrics / f"transcripts-{step:06d}.txt").write_text(transcripts(answers))
        append_record(evaluations_path(job.run), line)
        shutil.rmtree(self._folder(step), ignore_errors=True)
        print(f"step {step}: {sentence(summary)}", flush=True)

    def _folder(self, step: int) -> Path:
        return self._job.run.rollouts / f"evaluation-{step:08d}"
