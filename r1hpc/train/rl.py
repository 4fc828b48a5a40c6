"""Reinforcement learning with verifiable rewards: GRPO or PPO, rollout by rollout.

    outcome = run(job)      # on every rank

A rollout is followed by updates_per_rollout optimizer steps, and every one of them is a step of the loop: it
can be saved after any, also in the middle of a rollout's updates (where TRL generates anew from the newer
policy, huggingface/trl grpo_trainer.py). Asked to leave inside a rollout, the ranks go at once, and what was
finished of it is used after the resume.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from r1hpc.base.failpoints import failpoint
from r1hpc.plan.batch import BatchPlan, updates_per_rollout
from r1hpc.plan.model import load_model_config
from r1hpc.tasks.registry import make_task
from r1hpc.tasks.rewards import Scorer
from r1hpc.tasks.task import check_num_held_out
from r1hpc.tasks.tokenizer import load_tokenizer, special_ids
from r1hpc.train import loop
from r1hpc.train.algorithms import Floats
from r1hpc.train.collect import Collected, Collector, checksum, rollout_facts
from r1hpc.train.critic import ActorCritic
from r1hpc.train.engine import accumulate, learning_rate, set_learning_rate
from r1hpc.train.errors import TrainError
from r1hpc.train.evaluate import Evaluator
from r1hpc.train.export import export_model
from r1hpc.train.held_out import HeldOut
from r1hpc.train.loop import Job, Outcome, Session, StepResult
from r1hpc.train.policy import build_policy, build_reference, build_rollout_engine, policy_of
from r1hpc.train.prompts import Prompts
from r1hpc.train.rollout import RolloutEngine
from r1hpc.train.update import Rollout, Rows, Tally, Updater
from r1hpc.train.window import read_groups, write_groups

_WINDOW = "stage_rank_0_window.npz"
_VALUES = "stage_rank_0_values.npy"
_BATCH = "stage_rank_0_"
_HEALTH_WINDOW = 20
"""Steps that the health warnings look back on, and steps between two looks."""


def run(job: Job) -> Outcome:
    """Train until the last step or until asked to stop."""
    loop.check_device(job)
    config, group = job.config, job.group
    tokenizer = load_tokenizer(config.model)
    ids = special_ids(tokenizer, config.model)
    task = make_task(config.task)
    check_num_held_out(task, config.evaluate.num_items)
    hf_config = load_model_config(config, tokenizer.get_vocab_size())
    job.watchdog.beat("building the model")
    policy = build_policy(config, hf_config)
    network = ActorCritic(policy) if config.rl.algorithm == "ppo" else policy
    reference = build_reference(job, hf_config)
    prompts = Prompts(tokenizer, config.rollout.max_prompt_length)
    engine = build_rollout_engine(job, hf_config, ids, config.deepspeed.zero_stage)
    scorer = Scorer(
        config.reward,
        task,
        max_completion_length=config.rollout.max_completion_length,
        flops_per_token=loop.model_flops_per_token(hf_config, config.rollout.max_completion_length),
    )
    with scorer:
        collector = Collector(job, task, prompts, engine, scorer)
        evaluator = Evaluator(config, task, prompts, engine, scorer)
        stage = RlStage(
            job,
            collector=collector,
            held_out=HeldOut(job, evaluator, engine, collector.asked_to_stop),
            engine=engine,
            task_item=task.item,
            prompts=prompts,
        )
        plan = loop.Plan(
            network=network,
            hf_config=hf_config,
            batch=BatchPlan(config.train.global_batch_size, config.train.micro_batch_size, 1),
            data_id=task.id,
            order_id=f"items in order, {config.rollout.num_prompts} x {config.rollout.num_generations}",
            parameters=network.parameter_groups(config) if isinstance(network, ActorCritic) else None,
            facts={"reference": reference.id if reference else None, "algorithm": config.rl.algorithm},
        )
        session = loop.set_up(job, stage, plan)
        stage.updater = Updater(config, group, session.engine, ids.pad, reference)
        stage.tokenizer = tokenizer
        return loop.train(session, stage) if stage.begin(session) else stage.left(session)


class RlStage:
    """The stage. State: which rollout, which item comes next, how many updates were made on the rollout."""

    updater: Updater
    tokenizer: Any

    def __init__(
        self,
        job: Job,
        *,
        collector: Collector,
        held_out: HeldOut,
        engine: RolloutEngine,
        task_item: Any,
        prompts: Prompts,
    ) -> None:
        self._job = job
        self._collector = collector
        self._held_out = held_out
        self._engine = engine
        self._item = task_item
        self._prompts = prompts
        self._window = 0
        self._next_item = 0
        self._update = 0
        self._tokens = 0
        self._policy_id = ""
        self._collected: Collected | None = None
        self._rollout: Rollout | None = None
        self._values: Floats | None = None
        self._recent: list[dict[str, Any]] = []

    def begin(self, session: Session) -> bool:
        """The evaluation that is due where this attempt starts; False: asked to leave."""
        step, every = session.first_step - 1, self._job.config.evaluate.every
        is_due = step == 0 or (every > 0 and step % every == 0)
        return not is_due or step >= self._job.config.train.num_steps or self._evaluate(session, step)

    def take_step(self, session: Session, step: int) -> StepResult | None:
        """One update, after a rollout where the last one is used up."""
        job, engine, train_ = self._job, session.engine, self._job.config.train
        started = time.monotonic()
        job.watchdog.beat(f"rollout for step {step}")
        failpoint("step.begin")
        if self._collected is None and not self._collect(session):
            return None
        assert self._collected is not None
        if self._rollout is None:
            self._rollout = self._prepared()
        updating = time.monotonic()
        job.watchdog.beat(f"update of step {step}")
        failpoint("update.begin")
        rate = learning_rate(train_, step)
        set_learning_rate(engine, rate)
        skipped_before = engine.skipped_steps
        tally, rows = Tally(), self.updater.rows_of(self._rollout, self._update)
        losses = self.updater.losses(self._rollout, rows, self._update == 0, tally)
        loss, norm, forward_s = accumulate(engine, losses)
        skipped = engine.skipped_steps > skipped_before
        edge = loop.agree(session, loss, tally.numbers())
        loop.check_finite(session, step, edge, loss, norm, skipped)
        self._check_sampler(edge)
        now = time.monotonic()
        sampling_s = self._collected.own_time_s if self._update == 0 else 0.0
        session.rank_times.step(step, now - started, sampling_s + forward_s)
        self._record(session, step, edge, rows, norm, rate, skipped, now - started, now - updating)
        self._advance()
        every = job.config.evaluate.every
        if every and step % every == 0 and step < train_.num_steps and not edge.stop:
            # What was asked for in between was asked for at this edge: the next attempt begins with it.
            edge = replace(edge, stop=not self._evaluate(session, step))
        return edge

    def meta(self, step: int) -> dict[str, Any]:
        return {
            "window": self._window,
            "next_item": self._next_item,
            "update": self._update,
            "tokens": self._tokens,
            "num_items": self._collected.num_items if self._collected else 0,
        }

    def write_state(self, folder: Path) -> None:
        """Rank 0: the rollout whose updates are under way, or the finished batches of one being sampled."""
        if self._job.group.rank != 0:
            return
        if self._collected is not None:
            write_groups(folder / _WINDOW, self._collected.groups, self._policy_id)
            if self._rollout is not None and self._rollout.values is not None:
                np.save(folder / _VALUES, self._rollout.values)
            return
        for batch in sorted(self._collector.journal(self._window).glob("batch-*.npz")):
            shutil.copyfile(batch, folder / f"{_BATCH}{batch.name}")

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        self._window, self._next_item = int(meta["window"]), int(meta["next_item"])
        self._update, self._tokens = int(meta["update"]), int(meta["tokens"])
        if (folder / _WINDOW).exists():
            self._policy_id, groups = read_groups(folder / _WINDOW)
            self._collected = Collected(groups, int(meta["num_items"]), 0.0, 0.0)
            # The critic's word from before the updates that were made since.
            self._values = np.load(folder / _VALUES) if (folder / _VALUES).exists() else None
        if self._job.group.rank == 0:
            self._restore_batches(folder)

    def finish(self, session: Session) -> bool:
        """Judge the trained policy on held-out items, and leave it as a Hugging Face folder."""
        job = self._job
        if not self._evaluate(session, job.config.train.num_steps):
            return False
        job.watchdog.beat("exporting the model")
        export_model(policy_of(session.engine), job.group, job.run.model, self.tokenizer)
        return True

    def left(self, session: Session) -> Outcome:
        """Asked to leave before the first step of this attempt."""
        step = session.first_step - 1
        loop.save(session, self, step, hurry=True)
        return loop.stopped(session, self, step)

    def kept(self, step: int) -> int:
        return self._collector.num_kept(self._window) + self._held_out.num_kept(step)

    def _evaluate(self, session: Session, step: int) -> bool:
        return self._held_out.evaluate(policy_of(session.engine), step)

    def _collect(self, session: Session) -> bool:
        self._policy_id = self._engine.sync_weights(policy_of(session.engine))
        self._collected = self._collector.collect(session, self._window, self._next_item, self._policy_id)
        self._engine.release()
        return self._collected is not None

    def _prepared(self) -> Rollout:
        assert self._collected is not None
        groups = self._collected.groups
        prompts = [self._prompts.ids(self._item(int(i))) for i in groups.items]
        return self.updater.prepare(groups, prompts, self._values)

    def _advance(self) -> None:
        assert self._collected is not None
        self._update += 1
        if self._update < updates_per_rollout(self._job.config):
            return
        self._next_item += self._collected.num_items
        self._window, self._update = self._window + 1, 0
        self._collected = self._rollout = self._values = None
        if self._job.group.rank == 0:
            self._collector.forget_before(self._window - 1)

    def _restore_batches(self, folder: Path) -> None:
        """Put the batches that the checkpoint holds back beside those written after it."""
        journal = self._collector.journal(self._window)
        for batch in folder.glob(f"{_BATCH}batch-*.npz"):
            target = journal / batch.name.removeprefix(_BATCH)
            if not target.exists():
                journal.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copyfile(batch, target)

    def _check_sampler(self, edge: StepResult) -> None:
        most = self._job.config.rollout.max_logprob_difference
        difference = _mean_of(edge, "difference")
        if self._update == 0 and difference is not None and difference > most:
            raise TrainError(
                f"the sampler's log-probabilities are {difference:.3g} nats off the trainer's on average, "
                f"and rollout.max_logprob_difference is {most:g}: the two do not run the same policy "
                "(another attention, precision or template?)"
            )

    def _record(
        self,
        session: Session,
        step: int,
        edge: StepResult,
        rows: Rows,
        norm: float,
        rate: float,
        skipped: bool,
        step_time_s: float,
        update_time_s: float,
    ) -> None:
        assert self._collected is not None
        groups, is_first = self._collected.groups, self._update == 0
        num_tokens = int(groups.lengths[rows].sum())
        self._tokens += num_tokens
        if self._job.group.rank != 0:
            return
        extra = {
            **rollout_facts(self._collected),
            # Over the rows that were trained on: those of groups without variance are not even computed.
            "kl": _mean_of(edge, "kl"),
            "entropy": _mean_of(edge, "entropy"),
            "clip_fraction": _mean_of(edge, "clipped"),
            "logprob_difference": _mean_of(edge, "difference") if is_first else None,
            "rollout_time_s": self._collected.rollout_time_s if is_first else 0.0,
            "reward_time_s": self._collected.reward_time_s if is_first else 0.0,
            "update_time_s": update_time_s,
            "window": self._window,
            "update": self._update,
            "value_loss": _sum_of(edge, "value_loss"),
        }
        done = loop.StepRecord(
            loss=edge.loss,
            grad_norm=norm,
            lr=rate,
            tokens=self._tokens,
            step_tokens=num_tokens,
            step_time_s=step_time_s,
            data_time_s=0.0,
            skipped=skipped,
            extra=extra,
        )
        used = {
            "first_sample": self._next_item if is_first else self._next_item + self._collected.num_items,
            "num_samples": self._collected.num_items if is_first else 0,
            "checksum": checksum(self._collected) if is_first else 0,
        }
        loop.record(session, step, done, used)
        self._watch_health(session, step, extra)

    def _watch_health(self, session: Session, step: int, extra: dict[str, Any]) -> None:
        """Every _HEALTH_WINDOW steps: say so when they look like a known way to fail."""
        from r1hpc.telemetry.diagnose import health_warnings

        self._recent = [*self._recent[-(_HEALTH_WINDOW - 1) :], {"global_step": step, **extra}]
        if len(self._recent) < _HEALTH_WINDOW or step % _HEALTH_WINDOW:
            return
        for finding in health_warnings(self._recent):
            session.metrics.event("warning", global_step=step, code=finding.code, text=finding.sentence)
            print(f"warning, {finding.code}: {finding.sentence}", flush=True)


_TALLY = tuple(vars(Tally()))


def _sum_of(edge: StepResult, name: str) -> float:
    return edge.sums[_TALLY.index(name)]


def _mean_of(edge: StepResult, name: str) -> float | None:
    """Per token that was trained on; None where there was none."""
    tokens = _sum_of(edge, "tokens")
    return _sum_of(edge, name) / tokens if tokens else None
