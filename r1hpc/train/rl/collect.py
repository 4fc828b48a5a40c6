"""Collect a rollout: sample, reward, save each finished batch at once, and drop the current one at a stop.

A batch is the prompts that one rank decodes together. Once rewarded it is written to rollouts/window-<rollout
index>/batch-<first item>-<groups>.npz, with the id of the policy that sampled it. After a preemption, on any
number of ranks, only missing groups are sampled. Each completion has its own random stream, so with the same
batches (as many ranks, or rollout.prompts_per_batch set) the rollout is bit-identical to that of an
undisturbed run. Batches of another width round differently, and a token that was nearly another may become
it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from r1hpc.base.errors import StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.tasks.problems.task import members
from r1hpc.train.loop.session import Job, Session
from r1hpc.train.loop.step import agree
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rl.record import policy_of, read_record, write_record
from r1hpc.train.rl.rollout import Rollout, varied
from r1hpc.train.rl.samples import keep_samples
from r1hpc.train.rollout.groups import Groups, read_groups, write_groups
from r1hpc.train.rollout.judge import Judge

_IN_CHECKPOINT = "stage_rank_0_"


class Collector:
    """Collect the rollouts of one run."""

    def __init__(self, job: Job, judge: Judge, policy: Any) -> None:
        """`policy` is the language model that samples."""
        self._job = job
        self._judge = judge
        self._policy = policy
        self._folder = job.run.rollouts
        self._is_mixture = bool(members(judge.task).keys() - {""})
        self._rollout_s = self._reward_s = 0.0
        self._given: dict[int, Groups] = {}
        """On rank 0: groups of the current rollout that were sampled elsewhere, by item."""
        self.ahead = job.config.rl.max_staleness
        """How many rollouts are sampled before they are trained on."""

    def collect(self, session: Session, rollout_index: int, first_item: int, version: int) -> Rollout | None:
        """Return the rollout from item `first_item` on; None if a stop was requested. The current policy
        samples it, which is number `version`.

        Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) replaces groups whose rewards are all equal by
        further items, in at most rl.max_resamples more rounds. If too few are found, equal groups fill the
        rollout.
        """
        config, engine = self._job.config, self._judge.engine
        policy_id = engine.sync_weights(self._policy)
        self._rollout_s = self._reward_s = 0.0
        wanted, rounds, end = config.rollout.num_prompts, list[Groups](), first_item
        for _ in range(1 + config.rl.max_resamples):
            sampled = self._round(session, rollout_index, range(end, end + wanted), policy_id, version)
            if sampled is None:
                break
            end += wanted
            rounds.append(sampled)
            groups = Groups.joined(rounds)
            teaching = varied(groups, config.reward.terms.get("overlong", 0.0))
            if config.rl.max_resamples == 0 or teaching.sum() >= wanted:
                break
        engine.release()
        if sampled is None:
            return None
        if config.rl.max_resamples:
            # Prefer groups with unequal rewards, then restore the order of the items.
            groups = groups.select(np.sort(np.argsort(~teaching, kind="stable")[:wanted]))
        times, num_items = (self._rollout_s, self._reward_s), end - first_item
        return Rollout(groups, policy_id, num_items, rollout_index, *times, engine_facts=engine.facts())

    def replay(self, recorded: RunDir, rollout_index: int, first_item: int) -> Rollout:
        """Return a rollout of another run's record. Raise TrainError if the weights are not those that the
        recorded run had before it."""
        engine = self._judge.engine
        try:
            rollout = read_record(recorded, rollout_index, first_item)
            expected = policy_of(recorded, rollout_index, self._job.config.rl.max_staleness)
        except StateError as error:
            raise TrainError(
                f"rl.replay={recorded.path} cannot go on: {error}. A replay needs every file of "
                f"{recorded.trained} as it was written: put it back from a copy, or replay another run"
            ) from None
        policy_id = engine.sync_weights(self._policy)
        engine.release()
        if expected not in (None, policy_id):
            raise TrainError(
                f"before rollout {rollout_index} this run has other weights than {recorded.path} had (id "
                f"{policy_id}, not {expected}), so it is no replay. Use as many ranks, the same kind of "
                "machine and the same libraries"
            )
        return rollout

    def record(self, rollout: Rollout, first_item: int) -> None:
        """Record a rollout, on rank 0, before it is trained on."""
        write_record(self._job.run, rollout, first_item)

    def _round(
        self, session: Session, rollout_index: int, items: Sequence[int], policy_id: str, version: int
    ) -> Groups | None:
        """Sample and reward `items` batch by batch, each batch on one rank."""
        job, group = self._job, self._job.group
        already_done = self._already_done(rollout_index, items, policy_id)
        by_item: dict[int, Groups] = group.broadcast(already_done | self._given)
        # Every rank gets some.
        share = -(-len(items) // group.world_size)
        size = min(job.config.rollout.prompts_per_batch or share, share)
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        missing = [left for batch in batches if (left := [item for item in batch if item not in by_item])]
        fresh: list[Groups] = []
        for batch in missing[group.rank :: group.world_size]:
            began, sampled_s = time.monotonic(), -self._judge.sampling_s
            groups = self._judge.groups(batch, version, self.stop_requested)
            sampled_s += self._judge.sampling_s
            self._rollout_s += sampled_s
            self._reward_s += time.monotonic() - began - sampled_s
            if groups is None:
                break
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._journal(rollout_index).mkdir(mode=0o700, exist_ok=True)
            name = f"batch-{batch[0]:012d}-{len(batch)}.npz"
            write_groups(self._journal(rollout_index) / name, groups, policy_id)
            fresh.append(groups)
        # A rank that was asked to stop made less than its share: then all ranks leave the rollout here.
        agreed = agree(session, sums=[float(len(fresh))])
        if agreed.stop or agreed.sums[0] < len(missing):
            return None
        for part in group.gather(fresh):
            by_item |= _by_item(part)
        return Groups.joined([by_item[item] for item in items])

    def _already_done(self, rollout_index: int, items: Sequence[int], policy_id: str) -> dict[int, Groups]:
        """Return the groups an earlier attempt finished with this policy; only rank 0 reads."""
        found: dict[int, Groups] = {}
        if self._job.group.rank != 0:
            return found
        for path in self._batches(rollout_index):
            try:
                policy, groups = read_groups(path)
            except StateError:
                continue
            if policy == policy_id:
                parts = _by_item([self.with_prompts(groups)])
                found |= {item: one for item, one in parts.items() if item in items}
        if found:
            done = f"{len(found)} of {len(items)} groups were already done"
            print(f"rollout {rollout_index}: {done}", flush=True)
        return found

    def with_prompts(self, groups: Groups) -> Groups:
        """Return groups with their prompts, which files of format 1 lack."""
        if groups.prompts:
            return groups
        items = [self._judge.task.item(int(item)) for item in groups.items]
        return replace(groups, prompts=tuple(self._judge.prompt(item) for item in items))

    def labels(self, groups: Groups) -> list[str]:
        """Return each group's task; nothing unless there are several."""
        return [self._judge.task.item(int(item)).task for item in groups.items if self._is_mixture]

    def keep_samples(self, step: int, groups: Groups) -> None:
        """Keep some of a rollout's completions for people; `step` is its first update. Rank 0 only."""
        keep_samples(self._job, self._judge, step, groups)

    def num_kept(self, rollout_index: int) -> int:
        """Return how many finished groups of a rollout are on disk, by their files' names."""
        return sum(int(path.stem.rsplit("-", 1)[1]) for path in self._batches(rollout_index))

    def batches_writer(self, rollout_index: int) -> Callable[[Path], None]:
        """Return a function that copies the finished batches into a checkpoint's folder. Rank 0 only. There
        are some only if a stop was requested during sampling."""
        batches = self._batches(rollout_index)

        def copy_into(folder: Path) -> None:
            for batch in batches:
                # Missing if training is two rollouts ahead: this checkpoint's state does not need it.
                with suppress(FileNotFoundError):
                    shutil.copyfile(batch, folder / f"{_IN_CHECKPOINT}{batch.name}")

        return copy_into

    def restore_batches(self, rollout_index: int, folder: Path) -> None:
        """Copy a checkpoint's batches back beside those written after it, on rank 0."""
        journal = self._journal(rollout_index)
        for batch in folder.glob(f"{_IN_CHECKPOINT}batch-*.npz"):
            target = journal / batch.name.removeprefix(_IN_CHECKPOINT)
            if not target.exists():
                journal.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(batch, target)

    def forget_before(self, rollout_index: int) -> None:
        """Remove the batches of earlier rollouts."""
        for folder in self._folder.glob("window-*"):
            if folder.name < self._journal(rollout_index).name:
                shutil.rmtree(folder, ignore_errors=True)

    def stop_requested(self) -> bool:
        """True if this rank was asked to stop (no collective). Also beats the watchdog."""
        self._job.watchdog.beat("sampling or rewarding")
        return self._job.requests.poll()[0]

    def _journal(self, rollout_index: int) -> Path:
        return self._folder / f"window-{rollout_index:08d}"

    def _batches(self, rollout_index: int) -> list[Path]:
        return sorted(self._journal(rollout_index).glob("batch-*.npz"))


def _by_item(parts: Sequence[Groups]) -> dict[int, Groups]:
    """Return each group by itself, as wide as its batch was."""
    return {int(item): part.select([at]) for part in parts for at, item in enumerate(part.items)}
