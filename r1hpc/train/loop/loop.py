"""Run the training loop of pretraining, SFT and RL: step, save, stop between steps, resume.

A stage brings the network, the data and a step's losses. The loop brings the engine and checkpoints; a
stage's `take_step` calls step.optimizer_step.
"""

import hashlib
import json
from typing import Any

import torch

from r1hpc.attempt.control.stop import is_save_due
from r1hpc.attempt.workload import Outcome
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.client.held.streams import seed_streams
from r1hpc.plan.model.families import UnknownModelError
from r1hpc.plan.model.shape import flops_per_token, model_shape
from r1hpc.plan.topology.gpus import peak_flops
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.train.checkpoint.identity import Identity, base_facts, compression_of, precision_of
from r1hpc.train.checkpoint.snapshot import Snapshots
from r1hpc.train.loop.session import Job, Plan, Session, Stage
from r1hpc.train.loop.step import agree, finish_save
from r1hpc.train.parallel.compression import Compressor, exchange_of
from r1hpc.train.parallel.distributed import RankTimes
from r1hpc.train.parallel.engine import build_engine, deepspeed_config


def set_up(job: Job, stage: Stage, plan: Plan) -> Session:
    """Choose the checkpoint, build the engine, and load the state of the engine and the stage."""
    config, group = job.config, job.group
    identity = Identity(
        dataset_id=plan.data_id,
        plan_hash=plan.order_id,
        global_batch_size=plan.batch.global_batch_size,
        model=hashlib.sha256(json.dumps(plan.hf_config, sort_keys=True).encode()).hexdigest()[:16],
        precision=precision_of(config.train, config.model.base_quantization),
        zero_stage=config.deepspeed.zero_stage,
        world_size=group.world_size,
        facts={
            **plan.facts,
            **base_facts(config, group),
            "gradient_compression": compression_of(config.train),
        },
    )
    store = CheckpointStore(job.run.checkpoints, keep=config.checkpoint.keep)
    snapshots = Snapshots(
        store,
        group,
        job.attempt,
        job.token,
        identity,
        job.run.path,
        asynchronous=config.checkpoint.asynchronous,
        ranks_per_node=max(1, group.world_size // config.resources.nodes),
        beat=job.watchdog.beat,
        hang_timeout_s=config.train.hang_timeout_s,
    )
    job.watchdog.before_leaving = snapshots.settle
    job.watchdog.beat("verifying checkpoints")
    checkpoint = snapshots.choose()
    job.watchdog.beat("building the engine")
    on_gpu = group.device.type == "cuda"
    ds_config = deepspeed_config(
        config,
        world_size=group.world_size,
        on_gpu=on_gpu,
        load_universal=snapshots.needs_conversion(checkpoint),
    )
    engine = build_engine(plan.network, ds_config, plan.parameters)
    exchange = exchange_of(config.train, engine, group)
    if isinstance(exchange, Compressor):
        snapshots.carry(exchange)
    seed_streams(config.train.seed, 0, group.rank)
    step = 0
    if checkpoint is not None:
        job.watchdog.beat("loading the checkpoint")
        checkpoint = snapshots.load(engine, checkpoint)
        step = checkpoint.step
        stage.read_state(checkpoint.path, checkpoint.manifest.meta)
    metrics = MetricWriter(job.run, job.attempt)
    if group.rank == 0:
        print(_opening_line(job, plan, step), flush=True)
        metrics.event("resume" if step else "fresh", global_step=step)
    return Session(
        job=job,
        engine=engine,
        snapshots=snapshots,
        metrics=metrics,
        first_step=step + 1,
        hf_config=plan.hf_config,
        peak_flops=peak_flops(torch.cuda.get_device_name(group.device)) if on_gpu else None,
        rank_times=RankTimes(job.run, job.attempt, job.node, group),
        exchange=exchange,
    )


def train(session: Session, stage: Stage) -> Outcome:
    """Step until the last step or a stop request; then finish the stage."""
    job, last_step, step = session.job, session.job.config.train.num_steps, session.first_step - 1
    try:
        stop = not stage.begin(session)
        if stop:
            _save(session, stage, step, hurry=True)
        else:
            stop = agree(session).stop
        while step < last_step and not stop and not stage.is_done:
            result = stage.take_step(session, step + 1)
            if result is None:
                _save(session, stage, step, hurry=True)
                stop = True
                break
            step, stop = step + 1, result.stop
            asked = result.save or result.stop or stage.is_done
            if is_save_due(step, every=job.config.checkpoint.save_every, last=last_step, asked=asked):
                _save(session, stage, step, hurry=result.stop)
        finish_save(session)
        finished = (step >= last_step or stage.is_done) and not stop and stage.finish(session)
    except Exception:
        session.snapshots.settle()
        raise
    committed = session.snapshots.last_committed_step
    if finished:
        return Outcome(True, step, committed)
    return Outcome(False, step, committed, job.stop_reason(), stage.kept(step))


def _save(session: Session, stage: Stage, step: int, hurry: bool) -> None:
    """Save the state after `step`. In a hurry it is committed on return, else perhaps only copied."""
    job, snapshots = session.job, session.snapshots
    if snapshots.step_being_written != step:
        if hurry:
            snapshots.make_way(job.requests.seconds_left())
        finish_save(session, hurry=hurry)
        if snapshots.last_committed_step != step:
            job.watchdog.beat(f"saving step {step}")
            meta: dict[str, Any] = {"global_step": step, "seed": job.config.train.seed}
            meta |= {"num_nodes": job.config.resources.nodes, **stage.meta(step)}
            snapshots.save(
                session.engine,
                step,
                meta,
                hurry=hurry,
                write_more=stage.state_writer(),
                make_durable=session.metrics.make_durable,
            )
            job.requests.copied()
            job.watchdog.beat(f"after saving step {step}")
    if hurry or not job.config.checkpoint.asynchronous:
        finish_save(session, hurry=hurry)


def _opening_line(job: Job, plan: Plan, step: int) -> str:
    group = job.group
    start = f"resuming after step {step}" if step else "starting"
    shared = job.config.train.sequence_parallel
    sharing = f", {shared} of them to a sequence" if shared > 1 else ""
    return (
        f"attempt {job.attempt}: {start} on {group.world_size} rank(s){sharing}, {group.device.type}, "
        f"ZeRO {job.config.deepspeed.zero_stage}, "
        f"{precision_of(job.config.train, job.config.model.base_quantization)}, "
        f"accumulation {plan.batch.gradient_accumulation_steps}, data {plan.data_id[:24]}"
    )


def model_flops_per_token(hf_config: dict[str, Any], seq_len: int) -> float | None:
    """Return FLOPs of forward and backward per token, for MFU; None if the family cannot be counted."""
    try:
        return flops_per_token(model_shape(hf_config), seq_len)
    except UnknownModelError:
        return None
