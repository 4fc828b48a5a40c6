"""Collect a rollout: sample, reward, keep each finished batch at once, stop in between when asked to.

    rollout = collector.collect(session, rollout_index, first_item)      # None when a stop was requested

A batch is the prompts that one rank decodes together. Finished and rewarded, it is written to
rollouts/window-<rollout index>/batch-<first item>-<groups>.npz with the name of the policy that sampled it;
started again after a preemption, on any number of ranks, only the groups are made that are missing. Every
completion has a random stream of its own: decoded in the same batches (on as many ranks, or with
rollout.prompts_per_batch) the rollout is to the bit the one an undisturbed run would have had; in others, of
another width, a token that was nearly another one may become it.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from r1hpc.base.errors import StateError
from r1hpc.base.failpoints import failpoint
from r1hpc.base.files import read_json, write_json
from r1hpc.tasks.problems.curriculum import PassRates
from r1hpc.tasks.problems.task import Item, members
from r1hpc.train.loop import loop
from r1hpc.train.loop.session import Job, Session
from r1hpc.train.rl.rollout import Groups, Rollout, read_groups, varied, write_groups
from r1hpc.train.rollout.policy import policy_of
from r1hpc.train.rollout.sampler import Judge
from r1hpc.train.rollout.torch_engine import Samples

_IN_CHECKPOINT = "stage_rank_0_"
"""Before the name of a batch that a checkpoint holds."""
_RATES = f"{_IN_CHECKPOINT}pass_rates.json"


class Collector:
    """Collects rollouts for one run."""

    def __init__(self, job: Job, judge: Judge) -> None:
        self._job = job
        self._judge = judge
        self.rates = PassRates(job.config.task.seed) if job.config.rl.by_pass_rate else None
        """How often each question was solved; None: items are asked one after the other."""
        self._rollout_s = self._reward_s = 0.0

    def collect(self, session: Session, rollout_index: int, first_item: int) -> Rollout | None:
        """The rollout from item `first_item` on, by the policy as it is; None when a stop was requested.

        With dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), groups that were rewarded all alike are
        replaced by further items, in at most rl.max_resamples more rounds; where that did not find enough,
        such groups fill the rollout up.
        """
        engine = self._judge.engine
        policy_id = engine.sync_weights(policy_of(session.engine))
        rollout = self._collected(session, rollout_index, first_item, policy_id)
        engine.release()
        return rollout

    def prompts(self, groups: Groups) -> list[tuple[int, ...]]:
        """The tokens of each group's prompt."""
        return [self._judge.prompt(self._judge.task.item(int(item))) for item in groups.items]

    def labels(self, groups: Groups) -> list[str]:
        """The label of each group's task; none where the run has one task."""
        task = self._judge.task
        if not members(task).keys() - {""}:
            return []
        return [task.item(int(item)).task for item in groups.items]

    def learn(self, groups: Groups) -> None:
        """Remember how often the questions of a rollout that is used up were solved."""
        if self.rates is not None:
            for item, correct in zip(
                groups.items, groups.correct.reshape(-1, groups.num_members), strict=True
            ):
                self.rates.add(self._judge.task.item(int(item)).prompt, float(correct.mean()))

    def num_kept(self, rollout_index: int) -> int:
        """How many groups of a rollout lie finished on disk, as far as their files' names tell."""
        return sum(int(path.stem.rsplit("-", 1)[1]) for path in self._batches(rollout_index))

    def batches_writer(self, rollout_index: int) -> Callable[[Path], None]:
        """What copies the batches of a rollout that are finished by now into a checkpoint's folder.

        On rank 0, like the next two. There are some only where a stop was asked for during sampling.
        """
        return partial(_copy_into, self._batches(rollout_index))

    def facts(self) -> dict[str, Any]:
        """For train.jsonl: of how many questions a pass rate is known, and their mean."""
        return (
            {} if self.rates is None else {"known_questions": len(self.rates), "pass_rate": self.rates.mean}
        )

    def rates_writer(self) -> Callable[[Path], None]:
        """What puts the pass rates, as of now, into a checkpoint's folder; likewise on rank 0."""
        if self.rates is None:
            return lambda folder: None
        state = self.rates.state()
        return lambda folder: write_json(folder / _RATES, state)

    def restore_rates(self, folder: Path) -> None:
        """Go on with the pass rates of a checkpoint; on every rank."""
        if self.rates is not None:
            self.rates.restore(read_json(folder / _RATES, dict[str, Any]))

    def restore_batches(self, rollout_index: int, folder: Path) -> None:
        """Put the batches that a checkpoint holds back beside those written after it."""
        journal = self._journal(rollout_index)
        for batch in folder.glob(f"{_IN_CHECKPOINT}batch-*.npz"):
            target = journal / batch.name.removeprefix(_IN_CHECKPOINT)
            if not target.exists():
                journal.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(batch, target)

    def forget_before(self, rollout_index: int) -> None:
        """Remove the batches of earlier rollouts."""
        for folder in self._job.run.rollouts.glob("window-*"):
            if folder.name < self._journal(rollout_index).name:
                shutil.rmtree(folder, ignore_errors=True)

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop, without asking the others; also a sign of life."""
        self._job.watchdog.beat("sampling or rewarding")
        return self._job.requests.poll()[0]

    def _journal(self, rollout_index: int) -> Path:
        """Where the finished batches of a rollout lie."""
        return self._job.run.rollouts / f"window-{rollout_index:08d}"

    def _batches(self, rollout_index: int) -> list[Path]:
        return sorted(self._journal(rollout_index).glob("batch-*.npz"))

    def _collected(
        self, session: Session, rollout_index: int, first_item: int, policy_id: str
    ) -> Rollout | None:
        config = self._job.config
        self._rollout_s = self._reward_s = 0.0
        wanted, rounds = config.rollout.num_prompts, []
        chosen = count(first_item) if self.rates is None else self.rates.chosen(self._judge.task, first_item)
        for _ in range(1 + config.rl.max_resamples):
            items = list(islice(chosen, wanted))
            done = self._round(session, rollout_index, items, policy_id)
            if done is None:
                return None
            rounds.append(done)
            groups = Groups.joined(rounds)
            teaching = varied(groups, config.reward.terms.get("overlong", 0.0))
            if config.rl.max_resamples == 0 or teaching.sum() >= wanted:
                break
        if config.rl.max_resamples:
            # Those that teach first, each kind in the order of its items.
            groups = groups.select(np.sort(np.argsort(~teaching, kind="stable")[:wanted]))
        return Rollout(
            groups,
            policy_id,
            items[-1] + 1 - first_item,
            self._rollout_s,
            self._reward_s,
            engine_facts=self._judge.engine.facts(),
        )

    def _round(
        self, session: Session, rollout_index: int, items: Sequence[int], policy_id: str
    ) -> Groups | None:
        """Batch by batch, each by one rank, until all of `items` are done."""
        job, group = self._job, self._job.group
        done: dict[int, Groups] = group.broadcast(self._already_done(rollout_index, items, policy_id))
        shares = [[item for item in share if item not in done] for share in self._shares(items)]
        missing = [share for share in shares if share]
        fresh: list[Groups] = []
        for share in missing[group.rank :: group.world_size]:
            made = self._batch(share)
            if made is None:
                break
            job.run.rollouts.mkdir(mode=0o700, exist_ok=True)
            self._journal(rollout_index).mkdir(mode=0o700, exist_ok=True)
            name = f"batch-{share[0]:012d}-{len(share)}.npz"
            write_groups(self._journal(rollout_index) / name, made, policy_id)
            fresh.append(made)
        # A rank that was asked to stop made fewer than its share: then all of them leave the rollout here.
        agreed = loop.agree(session, sums=[float(len(fresh))])
        if agreed.stop or agreed.sums[0] < len(missing):
            return None
        for part in group.gather(fresh):
            done |= _by_item(part)
        return Groups.joined([done[item] for item in items])

    def _shares(self, items: Sequence[int]) -> list[Sequence[int]]:
        """The items cut into what one rank decodes together, so that every rank has some."""
        share = -(-len(items) // self._job.group.world_size)
        size = min(self._job.config.rollout.prompts_per_batch or share, share)
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _already_done(self, rollout_index: int, items: Sequence[int], policy_id: str) -> dict[int, Groups]:
        """Groups that an earlier attempt finished with this very policy, perhaps on another number of ranks.

        Rank 0 reads them for all.
        """
        found: dict[int, Groups] = {}
        if self._job.group.rank != 0:
            return found
        for path in self._batches(rollout_index):
            try:
                policy, groups = read_groups(path)
            except StateError:
                continue
            if policy == policy_id:
                found |= {item: one for item, one in _by_item([groups]).items() if item in items}
        if found:
            print(
                f"rollout {rollout_index}: {len(found)} of {len(items)} groups were already done", flush=True
            )
        return found

    def _batch(self, indices: Sequence[int]) -> Groups | None:
        """Sample and reward one batch; None when a stop was requested."""
        rollout, judge, started = self._job.config.rollout, self._judge, time.monotonic()
        items = [judge.task.item(index) for index in indices]
        failpoint("rollout.batch")
        samples = judge.sample(
            items,
            rollout.num_generations,
            rollout.temperature,
            self._job.config.train.seed,
            self.stop_requested,
        )
        self._rollout_s += time.monotonic() - started
        if samples is None:
            return None
        started = time.monotonic()
        failpoint("reward.begin")
        groups = self._rewarded(items, samples)
        self._reward_s += time.monotonic() - started
        return groups

    def _rewarded(self, items: Sequence[Item], samples: Samples) -> Groups | None:
        scored = self._judge.score(items, samples, self.stop_requested)
        if scored is None:
            return None
        scores = [score for group in scored for _, score in group]
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


def _by_item(parts: Sequence[Groups]) -> dict[int, Groups]:
    """Each group by itself, as wide as its batch was."""
    return {int(item): part.select([at]) for part in parts for at, item in enumerate(part.items)}


def _copy_into(batches: Sequence[Path], folder: Path) -> None:
    for batch in batches:
        # Gone where training is two rollouts on by now: the state of this checkpoint does not need it.
        with suppress(FileNotFoundError):
            shutil.copyfile(batch, folder / f"{_IN_CHECKPOINT}{batch.name}")
