"""Train with GRPO, PPO or on-policy distillation, rollout by rollout.

Read a step top to bottom: `RlStage.take_step` here, then collect.py (sampling and rewards; rollout/judge.py
asks the engine and the verifier, and tasks/rewards.py scores), then update.py (advantages and losses; the
log-probabilities are in model/output_head.py).

A rollout is followed by updates_per_rollout optimizer steps (loop/step.py). Each is a step of the
loop, so a checkpoint can fall between two updates of a rollout. (TRL would generate again from the newer
policy there: huggingface/trl grpo_trainer.py.) A signal during sampling stops all ranks at once, and the
finished batches are used after the resume. Only rank 0 sees the file STOP and the GPU-hour limit: the others
finish their share first.

With rl.max_staleness=k, rollouts are sampled ahead: before it trains on rollout s, version s of the policy
samples the missing ones up to s + k. So k + 1 are sampled at first and then one for each trained on, as if
workers had sampled them meanwhile. A checkpoint carries those not yet trained on. With workers.patience_s,
workers do sample them: gather.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from r1hpc.attempt.workload import Outcome
from r1hpc.base.failpoints import failpoint
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.fence import has_begun, incarnation_dir
from r1hpc.config.paths import is_own
from r1hpc.config.plugins import locate
from r1hpc.plan.topology.batch import BatchPlan
from r1hpc.tasks.rewards import label
from r1hpc.tasks.text.tokenizer import check_teacher_tokens, exported_tokenizer, special_ids
from r1hpc.train.generate.evaluate import Asking, HeldOut, refuse_other_asking
from r1hpc.train.loop import loop
from r1hpc.train.loop.session import Job, Plan, Session, Stage, StepRecord, StepResult
from r1hpc.train.loop.step import optimizer_step, record
from r1hpc.train.model.export import export_model
from r1hpc.train.parallel.engine import check_precision
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rl.collect import Collector
from r1hpc.train.rl.gather import Gatherer
from r1hpc.train.rl.ppo import build_actor_critic
from r1hpc.train.rl.rollout import Experience, Rollout, Sums, Tally, load_rollouts, save_rollout
from r1hpc.train.rl.update import Updater
from r1hpc.train.rollout.judge import open_judge
from r1hpc.train.rollout.policy import build_policy, build_reference, placement
from r1hpc.train.rollout.torch_engine import logprob_limit


def run(job: Job) -> Outcome:
    """Train until the last step or until a stop is requested."""
    config = job.config
    check_precision(config.train)
    with open_judge(job, config.deepspeed.zero_stage) as (judge, hf_config):
        check_teacher_tokens(config)
        asking = Asking(judge.evaluated.id, judge.asking_id)
        evaluated = job.run.metrics / "evaluated.json"
        refuse_other_asking(job, evaluated, asking, "the run began", partial(has_kept, job.run))
        job.watchdog.beat("building the model")
        place, parameters = placement(config, job.group, divided=True), None
        if config.rl.algorithm == "ppo":
            network: Any = build_actor_critic(config, hf_config, place)
            policy, parameters = network.policy, network.parameter_groups(config)
        else:
            network = policy = build_policy(config, hf_config, place)
        reference = build_reference(job, hf_config, policy)
        of_reference = reference.id if reference else None
        facts: dict[str, Any] = {"reference": of_reference, "algorithm": config.rl.algorithm}
        facts["max_staleness"] = config.rl.max_staleness or None  # older checkpoints lack it
        # A checkpoint belongs to the custom reward terms it was trained with.
        if digests := {label(name): locate(name).digest for name in filter(is_own, config.reward.terms)}:
            facts["own_rewards"] = digests
        has_workers = config.workers.patience_s is not None
        collector = (Gatherer if has_workers else Collector)(job, judge, policy)
        pad = special_ids(judge.tokenizer, config.model).pad
        updater = Updater(config, job.group, pad, policy, reference)
        stage = RlStage(job, policy, collector, updater, HeldOut(job, judge, collector.stop_requested))
        plan = Plan(
            network=network,
            hf_config=hf_config,
            batch=BatchPlan(config.train.global_batch_size, config.train.micro_batch_size, 1),
            data_id=judge.task.id,
            order_id=f"items in order, {config.rollout.num_prompts} x {config.rollout.num_generations}",
            parameters=parameters,
            facts=facts,
        )
        return loop.train(loop.set_up(job, stage, plan), stage)


class RlStage(Stage):
    """The RL stage. Its state: the rollout's number, the next item, and the updates made on the rollout."""

    def __init__(
        self, job: Job, policy: Any, collector: Collector, updater: Updater, held_out: HeldOut
    ) -> None:
        """`policy` is the language model inside the engine."""
        self._job = job
        self._policy = policy
        self._collector = collector
        self._updater = updater
        self._held_out = held_out
        self._max_difference = logprob_limit(job.config)
        self._incarnation = incarnation_dir(job.run.checkpoints, job.attempt, job.token)
        self._rollout_index = 0
        self._next_item = job.config.task.first_item or 0
        self._update = 0
        self._tokens = 0
        self._rollouts: list[Rollout] = []
        """The one trained on, and those sampled ahead."""
        self._experience: Experience | None = None

    def begin(self, session: Session) -> bool:
        """Run the evaluation due where this attempt starts; False if a stop was requested."""
        return self._evaluate_if_due(session, session.first_step - 1)

    def take_step(self, session: Session, step: int) -> StepResult | None:
        """Take one update. First run the evaluation due after the step before it, and sample a new rollout if
        the last one is used up. None if a stop was requested meanwhile."""
        if step > session.first_step and not self._evaluate_if_due(session, step - 1):
            return None
        job, engine, started = self._job, session.engine, time.monotonic()
        job.watchdog.beat(f"rollout for step {step}")
        failpoint("step.begin")
        sampled = self._sample(session)
        if sampled is None:
            return None
        rollout = self._rollouts[0]
        is_recorded = job.group.rank == 0 and job.config.rl.max_staleness > 0
        if is_recorded and self._update == 0 and has_begun(self._incarnation):
            # The ranks add up their gradients with rank 0's: no weight changes before this.
            self._collector.record(rollout, self._next_item)
        if self._experience is None:
            self._experience = self._updater.prepare(engine, rollout, rollout.groups.prompts)
        updating = time.monotonic()
        job.watchdog.beat(f"update of step {step}")
        failpoint("update.begin")
        updater, is_first = self._updater, self._update == 0
        tally = Tally(has_mask=updater.has_mask, has_staleness=updater.has_staleness)
        rows = updater.rows_of(self._experience, self._update)
        losses = updater.losses(engine, self._experience, rows, is_first, tally)
        result = optimizer_step(session, step, losses, tally.numbers)
        sums = Sums(*result.sums)
        self._check_sampler(sums, is_first)
        now = time.monotonic()
        sampling_s = sum((ahead.rollout_time_s + ahead.reward_time_s for ahead in sampled), 0.0)
        session.rank_times.step(step, now - started, sampling_s + result.forward_s)
        num_tokens = int(rollout.groups.lengths[rows].sum())
        self._tokens += num_tokens
        if job.group.rank == 0:
            if is_first and has_begun(self._incarnation):
                self._collector.keep_samples(step, rollout.groups)
            done = StepRecord(
                tokens=self._tokens,
                step_tokens=num_tokens,
                step_time_s=now - started,
                used=self._used(rollout),
                extra=self._facts(rollout, sampled, sums, now - updating),
            )
            record(session, step, result, done)
        self._advance(rollout)
        return result

    def _sample(self, session: Session) -> list[Rollout] | None:
        """Return the rollouts that it samples: those missing up to rl.max_staleness ahead of the one trained
        on; nothing between two updates of a rollout. None if a stop was requested."""
        config, sampled = self._job.config, list[Rollout]()
        last = (config.train.num_steps - 1) // self._updater.num_updates
        if config.rl.replay is not None:
            if not self._rollouts:
                recorded = RunDir(Path(config.rl.replay))
                self._rollouts = [self._collector.replay(recorded, self._rollout_index, self._next_item)]
            return []
        wanted = min(self._collector.ahead, last - self._rollout_index) + 1
        while self._update == 0 and len(self._rollouts) < wanted:
            first_item = self._next_item + sum(rollout.num_items for rollout in self._rollouts)
            rollout = self._collector.collect(session, self._sampling, first_item, self._rollout_index)
            if rollout is None:
                return None
            self._rollouts.append(rollout)
            sampled.append(rollout)
        return sampled

    @property
    def _sampling(self) -> int:
        """The number of the rollout that is sampled next."""
        return self._rollout_index + len(self._rollouts)

    def _evaluate_if_due(self, session: Session, step: int) -> bool:
        """Evaluate after `step` if that is due, while its checkpoint is written. `finish` runs the last one.
        False if a stop was requested; the next attempt then begins with it."""
        every = self._job.config.evaluate.every
        is_due = step == 0 or (every > 0 and step % every == 0)
        return not is_due or step >= self._job.config.train.num_steps or self._evaluate(session, step)

    def _evaluate(self, session: Session, step: int) -> bool:
        began = time.monotonic()
        done = self._held_out.evaluate(self._policy, step)
        if done and self._job.group.rank == 0:
            session.metrics.event("evaluation", global_step=step, seconds=time.monotonic() - began)
        return done

    def _check_sampler(self, sums: Sums, is_first: bool) -> None:
        most, difference = self._max_difference, sums.mismatch()
        if is_first and difference is not None and difference > most:
            raise TrainError(
                f"the sampler's log-probabilities are {difference:.3g} nats off the trainer's on average, "
                f"and rollout.max_logprob_difference is {most:g}: the two do not run the same policy "
                "(another attention, precision or template, or dropout?)"
            )

    def _advance(self, rollout: Rollout) -> None:
        self._update += 1
        if self._update < self._updater.num_updates:
            return
        self._next_item += rollout.num_items
        self._rollout_index, self._update = self._rollout_index + 1, 0
        self._rollouts, self._experience = self._rollouts[1:], None
        # A superseded attempt that still runs may be ahead of the one that owns these batches.
        if self._job.group.rank == 0 and has_begun(self._incarnation):
            # Keep the last rollout's batches: if the run is killed before the next save, it returns to them.
            self._collector.forget_before(self._rollout_index - 1)

    def finish(self, session: Session) -> bool:
        """Evaluate the trained policy, then export it as a Hugging Face folder."""
        job = self._job
        if not self._evaluate(session, job.config.train.num_steps):
            return False
        job.watchdog.beat("exporting the model")
        files = exported_tokenizer(job.config.model)
        export_model(self._policy, job.group, job.run.model, files)
        return True

    def kept(self, step: int) -> int:
        windows = range(self._rollout_index, self._rollout_index + self._job.config.rl.max_staleness + 1)
        return sum(map(self._collector.num_kept, windows)) + self._held_out.num_kept(step)

    def meta(self, step: int) -> dict[str, Any]:
        return {
            "window": self._rollout_index,  # the name in existing checkpoints
            "next_item": self._next_item,
            "update": self._update,
            "tokens": self._tokens,
            "num_items": self._rollouts[0].num_items if self._rollouts else 0,
            "ahead": [rollout.num_items for rollout in self._rollouts[1:]],
        }

    def state_writer(self) -> Callable[[Path], None]:
        """Return a writer of rank 0's state: the rollout trained on, those sampled ahead, and the finished
        batches of the one that is being sampled."""
        if self._job.group.rank != 0:
            return lambda folder: None
        copy_batches = self._collector.batches_writer(self._sampling)
        if not self._rollouts:
            return copy_batches
        (rollout, *ahead), experience = self._rollouts, self._experience
        if experience is not None:
            rollout = replace(rollout, values=experience.values, old_logprobs=experience.old_logprobs)
        is_complete = len(ahead) == self._job.config.rl.max_staleness

        def write(folder: Path) -> None:
            save_rollout(folder, rollout, ahead)  # these arrays never change
            if not is_complete:
                copy_batches(folder)

        return write

    def read_state(self, folder: Path, meta: dict[str, Any]) -> None:
        self._rollout_index, self._next_item = int(meta["window"]), int(meta["next_item"])
        self._update, self._tokens = int(meta["update"]), int(meta["tokens"])
        num_items = [int(meta["num_items"]), *meta.get("ahead", [])]
        rollouts = load_rollouts(folder, num_items, self._rollout_index)
        with_prompts = self._collector.with_prompts
        self._rollouts = [replace(rollout, groups=with_prompts(rollout.groups)) for rollout in rollouts]
        if self._job.group.rank == 0:
            self._collector.restore_batches(self._sampling, folder)

    def _facts(
        self, rollout: Rollout, sampled: Sequence[Rollout], sums: Sums, update_time_s: float
    ) -> dict[str, Any]:
        """Return a step's fields of train.jsonl. The rollouts `sampled` in this step have their times."""
        is_first, stale = self._update == 0, dict[str, Any]()
        if self._job.config.rl.max_staleness:
            drift = sums.drift / sums.stale_tokens if sums.stale_tokens else None
            stale = {**rollout.staleness_facts(), "drift": drift}
        importance = {
            "importance_weight": sums.per_token(sums.importance),
            "importance_capped_share": sums.per_token(sums.importance_capped),
            "importance_effective_share": sums.effective_share(),
            "importance_left_out_share": sums.per_token(sums.importance_left_out),
        }
        return {
            **rollout.facts(
                self._collector.labels(rollout.groups), by_group=self._job.config.rl.algorithm == "grpo"
            ),
            # Means over the rows trained on: groups without variance are not computed.
            "kl": sums.per_token(sums.kl),
            "entropy": sums.per_token(sums.entropy),
            "clip_fraction": sums.per_token(sums.clipped),
            "logprob_difference": sums.mismatch() if is_first else None,
            **stale,
            **(importance if self._updater.corrects_importance else {}),
            "rollout_time_s": sum((ahead.rollout_time_s for ahead in sampled), 0.0),
            "reward_time_s": sum((ahead.reward_time_s for ahead in sampled), 0.0),
            "update_time_s": update_time_s,
            "window": self._rollout_index,
            "update": self._update,
            "value_loss": sums.value_loss,
            **(sampled[-1].engine_facts if sampled else {}),
        }

    def _used(self, rollout: Rollout) -> dict[str, Any]:
        """Return the ledger's entry: a rollout's items count at its first update."""
        if self._update == 0:
            first, num, checksum = self._next_item, rollout.num_items, rollout.checksum()
        else:
            first, num, checksum = self._next_item + rollout.num_items, 0, 0
        return {"first_sample": first, "num_samples": num, "checksum": checksum}


def has_kept(run: RunDir) -> bool:
    """True if the run has kept completions, an evaluation or a checkpoint of its policy."""
    if run.rl_evaluations.exists():
        return True
    return any(run.checkpoints.glob("step-*")) or bool(run.all_batches)
