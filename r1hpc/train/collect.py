"""Collect a rollout: sample, reward, keep each finished batch at once, leave in between when asked to.

A batch is the prompts that one rank decodes together. Finished and rewarded, it is written to
rollouts/window-<w>/batch-<b>.npz, named after the policy that sampled it; started again after a preemption
the ranks do only what is missing, and since every completion has a random stream of its own, the rollout is
the one an undisturbed run would have had.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from r1hpc.base.errors import StateError
from r1hpc.base.failpoints import failpoint
from r1hpc.tasks.rewards import Completion, Scorer
from r1hpc.tasks.task import Item, Task
from r1hpc.train import loop
from r1hpc.train.loop import Job, Session
from r1hpc.train.prompts import Prompts
from r1hpc.train.rollout import Request, RolloutEngine, Samples, streams
from r1hpc.train.window import Groups, read_groups, write_groups

_GROUPS_AT_ONCE = 16
"""Groups rewarded between two looks at whether somebody asked to stop."""


@dataclass(frozen=True)
class Collected:
    """A rollout, the same on every rank."""

    groups: Groups
    num_items: int
    """Items used up, those of dropped groups included."""
    rollout_time_s: float
    """On this rank, like the next."""
    reward_time_s: float

    @property
    def own_time_s(self) -> float:
        return self.rollout_time_s + self.reward_time_s


class Collector:
    """Collects rollouts for one run."""

    def __init__(self, job: Job, task: Task, prompts: Prompts, engine: RolloutEngine, scorer: Scorer) -> None:
        self._job = job
        self._task = task
        self._prompts = prompts
        self._engine = engine
        self._scorer = scorer
        self._rollout_s = self._reward_s = 0.0

    def collect(self, session: Session, window: int, first_item: int, policy_id: str) -> Collected | None:
        """The rollout of `window`, whose first item is `first_item`; None when asked to leave.

        With dynamic sampling, groups that were rewarded all alike are replaced by further items, in at most
        rl.max_resamples more rounds; what is still missing then is missing.
        """
        config = self._job.config
        self._rollout_s = self._reward_s = 0.0
        wanted, rounds = config.rollout.num_prompts, []
        for number in range(1 + config.rl.max_resamples):
            done = self._round(session, window, number, first_item + number * wanted, policy_id)
            if done is None:
                return None
            rounds.append(done)
            groups = Groups.joined(rounds)
            if config.rl.max_resamples == 0:
                break
            teaching = np.flatnonzero(varied(groups))
            if len(teaching) >= wanted:
                groups = groups.select(teaching[:wanted])
                break
        else:
            groups = groups.select(teaching) if len(teaching) else rounds[0]
        return Collected(groups, len(rounds) * wanted, self._rollout_s, self._reward_s)

    def journal(self, window: int) -> Path:
        """Where the finished batches of a window lie."""
        return self._job.run.rollouts / f"window-{window:08d}"

    def forget_before(self, window: int) -> None:
        """Remove the batches of windows that a checkpoint has made superfluous. Rank 0 only."""
        for folder in self._job.run.rollouts.glob("window-*"):
            if folder.name < self.journal(window).name:
                shutil.rmtree(folder, ignore_errors=True)

    def _round(
        self, session: Session, window: int, number: int, first_item: int, policy_id: str
    ) -> Groups | None:
        """One batch of prompts for each rank and more, until all of the round are done."""
        job, group = self._job, self._job.group
        shares = self._batches(first_item)
        numbers = range(number * len(shares), (number + 1) * len(shares))
        done = self._already_done(window, dict(zip(numbers, shares, strict=True)), policy_id)
        fresh: dict[int, Groups] = {}
        missing = [(b, items) for b, items in zip(numbers, shares, strict=True) if b not in done]
        for turn, (batch, items) in enumerate(missing):
            if turn % group.world_size != group.rank:
                continue
            made = self._batch(items)
            if made is None:
                break
            job.run.rollouts.mkdir(mode=0o700, exist_ok=True)
            self.journal(window).mkdir(mode=0o700, exist_ok=True)
            write_groups(self.journal(window) / f"batch-{batch:06d}.npz", made, policy_id)
            fresh[batch] = made
        edge = loop.agree(session, sums=[float(len(fresh))])
        if edge.stop or edge.sums[0] < len(missing):
            return None
        for part in group.gather(fresh):
            done |= part
        return Groups.joined([done[batch] for batch in sorted(done)])

    def _batches(self, first_item: int) -> list[range]:
        """The items of a round, cut into what one rank decodes together."""
        rollout = self._job.config.rollout
        size = rollout.prompts_per_batch or -(-rollout.num_prompts // self._job.group.world_size)
        end = first_item + rollout.num_prompts
        return [range(start, min(start + size, end)) for start in range(first_item, end, size)]

    def _already_done(self, window: int, wanted: dict[int, range], policy_id: str) -> dict[int, Groups]:
        """Batches that an earlier attempt finished with this very policy; rank 0 reads them for all."""
        found: dict[int, Groups] = {}
        folder = self.journal(window)
        if self._job.group.rank == 0 and folder.is_dir():
            for batch, items in wanted.items():
                try:
                    policy, groups = read_groups(folder / f"batch-{batch:06d}.npz")
                except StateError:
                    continue
                if policy == policy_id and groups.items.tolist() == list(items):
                    found[batch] = groups
            if found:
                print(
                    f"rollout {window}: {len(found)} of {len(wanted)} batches were already done", flush=True
                )
        told: dict[int, Groups] = self._job.group.broadcast(found)
        return told

    def _batch(self, indices: Sequence[int]) -> Groups | None:
        """Sample and reward one batch; None when asked to leave."""
        rollout, started = self._job.config.rollout, time.monotonic()
        items = [self._task.item(index) for index in indices]
        request = Request(
            prompts=[self._prompts.ids(item) for item in items],
            streams=streams(self._job.config.train.seed, indices, rollout.num_generations),
            num_generations=rollout.num_generations,
            max_completion_length=rollout.max_completion_length,
            temperature=rollout.temperature,
        )
        failpoint("rollout.batch")
        samples = self._engine.sample(request, self.asked_to_stop)
        self._rollout_s += time.monotonic() - started
        if samples is None:
            return None
        started = time.monotonic()
        failpoint("reward.begin")
        groups = self._rewarded(items, samples)
        self._reward_s += time.monotonic() - started
        return groups

    def _rewarded(self, items: Sequence[Item], samples: Samples) -> Groups | None:
        num = len(samples.lengths) // len(items)
        texts = self._prompts.texts(samples.tokens, samples.lengths)
        completions = [
            Completion(text, int(length), not bool(ended))
            for text, length, ended in zip(texts, samples.lengths, samples.ended, strict=True)
        ]
        scores = []
        for start in range(0, len(items), _GROUPS_AT_ONCE):
            if self.asked_to_stop():
                return None
            part = range(start, min(start + _GROUPS_AT_ONCE, len(items)))
            scored = self._scorer.score_groups(
                [(items[g], completions[g * num : (g + 1) * num]) for g in part]
            )
            scores += [score for group in scored for score in group]
        return Groups(
            items=np.array([item.index for item in items], np.int64),
            tokens=samples.tokens,
            logprobs=samples.logprobs,
            lengths=samples.lengths,
            ended=samples.ended,
            rewards=np.array([score.reward for score in scores]),
            correct=np.array([score.correct for score in scores]),
            terms={name: np.array([s.terms[name] for s in scores]) for name in scores[0].terms},
        )

    def asked_to_stop(self) -> bool:
        """This rank's own word, without asking the others; also a sign of life for the watchdog."""
        self._job.watchdog.beat("sampling or rewarding")
        return self._job.requests.poll()[0]


def varied(groups: Groups) -> npt.NDArray[np.bool_]:
    """(groups,): whether the members were rewarded differently."""
    rewards = groups.rewards.reshape(-1, groups.num_members)
    return np.asarray(np.ptp(rewards, axis=1) > 1e-6)


def rollout_facts(collected: Collected) -> dict[str, Any]:
    """What train.jsonl says of a rollout: rewards by term, lengths by outcome, what taught nothing."""
    groups = collected.groups
    lengths, correct = groups.lengths.astype(np.float64), groups.correct
    return {
        "reward": float(groups.rewards.mean()),
        "accuracy": float(correct.mean()),
        **{f"reward_{name}": float(values.mean()) for name, values in groups.terms.items()},
        "zero_variance_share": 1.0 - float(varied(groups).mean()),
        "response_length": float(lengths.mean()),
        "response_length_correct": float(lengths[correct].mean()) if correct.any() else None,
        "response_length_wrong": float(lengths[~correct].mean()) if not correct.all() else None,
        "truncated_share": 1.0 - float(groups.ended.mean()),
        "num_groups": len(groups.items),
        "num_items": collected.num_items,
    }


def checksum(collected: Collected) -> int:
    """Of the items and what was sampled for them: two runs that agree here trained on the same rollout."""
    groups = collected.groups
    digest = hashlib.sha256(groups.items.tobytes())
    for row, length in zip(groups.tokens, groups.lengths, strict=True):
        digest.update(row[:length].tobytes())
    digest.update(json.dumps([float(r).hex() for r in groups.rewards]).encode())
    return int.from_bytes(digest.digest()[:6])
