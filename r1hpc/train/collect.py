"""Collect a rollout: sample, reward, keep each finished batch at once, leave in between when asked to.

A batch is the prompts that one rank decodes together. Finished and rewarded, it is written to
rollouts/window-<w>/batch-<first item>-<groups>.npz with the name of the policy that sampled it; started again
after a preemption, on any number of ranks, only the groups are made that are missing, and since every
completion has a random stream of its own, the rollout is the one an undisturbed run would have had.
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
from r1hpc.tasks.rewards import Scorer
from r1hpc.tasks.task import Item, Task
from r1hpc.train import loop
from r1hpc.train.loop import Job, Session
from r1hpc.train.prompts import Prompts
from r1hpc.train.rollout import Groups, read_groups, write_groups
from r1hpc.train.sampling import Request, RolloutEngine, Samples, streams
from r1hpc.train.scoring import judge_samples


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
        rl.max_resamples more rounds; where that did not find enough, such groups fill the rollout up.
        """
        config = self._job.config
        self._rollout_s = self._reward_s = 0.0
        wanted, rounds = config.rollout.num_prompts, []
        for number in range(1 + config.rl.max_resamples):
            items = range(first_item + number * wanted, first_item + (number + 1) * wanted)
            done = self._round(session, window, items, policy_id)
            if done is None:
                return None
            rounds.append(done)
            groups = Groups.joined(rounds)
            teaching = varied(groups)
            if config.rl.max_resamples == 0 or teaching.sum() >= wanted:
                break
        if config.rl.max_resamples:
            # Those that teach first, each kind in the order of its items.
            groups = groups.select(np.sort(np.argsort(~teaching, kind="stable")[:wanted]))
        return Collected(groups, len(rounds) * wanted, self._rollout_s, self._reward_s)

    def journal(self, window: int) -> Path:
        """Where the finished batches of a window lie."""
        return self._job.run.rollouts / f"window-{window:08d}"

    def num_kept(self, window: int) -> int:
        """How many groups of a window lie finished on disk, as far as their files' names tell."""
        return sum(int(path.stem.rsplit("-", 1)[1]) for path in self.journal(window).glob("batch-*.npz"))

    def forget_before(self, window: int) -> None:
        """Remove the batches of earlier windows. Rank 0 only."""
        for folder in self._job.run.rollouts.glob("window-*"):
            if folder.name < self.journal(window).name:
                shutil.rmtree(folder, ignore_errors=True)

    def _round(self, session: Session, window: int, items: range, policy_id: str) -> Groups | None:
        """Batch by batch, each by one rank, until all of `items` are done."""
        job, group = self._job, self._job.group
        done = self._already_done(window, items, policy_id)
        shares = [[item for item in share if item not in done] for share in self._shares(items)]
        missing = [share for share in shares if share]
        fresh: list[Groups] = []
        for turn, share in enumerate(missing):
            if turn % group.world_size != group.rank:
                continue
            made = self._batch(share)
            if made is None:
                break
            job.run.rollouts.mkdir(mode=0o700, exist_ok=True)
            self.journal(window).mkdir(mode=0o700, exist_ok=True)
            name = f"batch-{share[0]:012d}-{len(share)}.npz"
            write_groups(self.journal(window) / name, made, policy_id)
            fresh.append(made)
        agreed = loop.agree(session, sums=[float(len(fresh))])
        if agreed.stop or agreed.sums[0] < len(missing):
            return None
        for part in group.gather(fresh):
            done |= _by_item(part)
        return Groups.joined([done[item] for item in items])

    def _shares(self, items: range) -> list[range]:
        """The items cut into what one rank decodes together, so that every rank has some."""
        share = -(-len(items) // self._job.group.world_size)
        size = min(self._job.config.rollout.prompts_per_batch or share, share)
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _already_done(self, window: int, items: range, policy_id: str) -> dict[int, Groups]:
        """Groups that an earlier attempt finished with this very policy, perhaps on another number of ranks.

        Rank 0 reads them for all.
        """
        found: dict[int, Groups] = {}
        folder = self.journal(window)
        if self._job.group.rank == 0 and folder.is_dir():
            for path in sorted(folder.glob("batch-*.npz")):
                try:
                    policy, groups = read_groups(path)
                except StateError:
                    continue
                if policy == policy_id:
                    found |= {item: one for item, one in _by_item([groups]).items() if item in items}
            if found:
                print(f"rollout {window}: {len(found)} of {len(items)} groups were already done", flush=True)
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
        judged = judge_samples(self._scorer, self._prompts, items, samples, self.asked_to_stop)
        if judged is None:
            return None
        scores = [score for group in judged for _, score in group]
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


def _by_item(parts: Sequence[Groups]) -> dict[int, Groups]:
    """Each group by itself, as wide as its batch was."""
    return {int(item): part.select([at]) for part in parts for at, item in enumerate(part.items)}


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
