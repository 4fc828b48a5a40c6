"""Find a run's order of samples for `shard trace --run`, and which rank reads what of a batch.

order = SampleOrder(..., **fill_in(arguments))      # the arguments of `shard trace`, filled in
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_json
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.load import read
from r1hpc.data.format.manifest import MANIFEST, read_manifest
from r1hpc.plan.run import PlanBatch
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.metrics import read_steps


def fill_in(arguments: Namespace) -> dict[str, Any]:
    """Fill in from the run's plan the arguments without a flag; return the other fields of a SampleOrder.

    Raise UsageError if the run reads another dataset, has no such step, or took it on other ranks.
    """
    run = open_run(arguments.run)
    config, plan = read(run.config), read_json(run.plan, PlanBatch)
    data = config.data
    if config.stage not in ("pretrain", "sft"):
        raise UsageError(f"{run.run_id} is of stage {config.stage}, which reads no dataset: name another run")
    step, num_steps = arguments.step, config.train.num_steps
    if step is not None and not 1 <= step <= num_steps:
        raise UsageError(f"--step {step}: {run.run_id} has the steps 1 to {num_steps}")
    plan_hash = _order_in_checkpoints(run, data.path, arguments.dir)
    if config.stage == "sft" and data.packing and step is not None:
        raise UsageError("data.packing puts documents of any rank into a row: take --sample")
    topology, batch, shared = plan["topology"], plan["batch"], config.train.sequence_parallel
    if step is not None:
        _refuse_other_ranks(run, arguments, topology["num_nodes"] * topology["ranks_per_node"])
    if arguments.world_size is None:
        arguments.rank //= shared  # ranks that share their sequences read as one
    known = {
        "seq_len": data.seq_len,
        "seed": data.seed,
        "global_batch_size": batch["global_batch_size"],
        "micro_batch_size": batch["micro_batch_size"],
        "world_size": topology["num_nodes"] * topology["ranks_per_node"] // shared,
    }
    for name, value in known.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return {"mix": data.mix, "validation_documents": data.validation_documents, "plan_hash": plan_hash}


def _refuse_other_ranks(run: RunDir, arguments: Namespace, num_ranks: int) -> None:
    """Refuse a step taken on other ranks: a --resume may have changed ranks and micro batch since."""
    if arguments.world_size is not None and arguments.micro_batch_size is not None:
        return
    taken = read_steps(run).effective.get(arguments.step)
    ranks = {each.attempt: each.ranks for each in read_history(run).attempts}
    then = ranks.get(taken.attempt) if taken is not None else None
    if then and then != num_ranks:
        raise UsageError(
            f"step {arguments.step} was taken on {then} ranks, and the plan of {run.run_id} is for "
            f"{num_ranks} now: give --world-size and --micro-batch-size as they were (ranks that share their "
            "sequences count as one)"
        )


def _order_in_checkpoints(run: RunDir, path: str | None, folder: Path) -> str | None:
    """Return the plan_hash in the run's newest checkpoint; UsageError if it read another dataset."""
    newest = next(iter(CheckpointStore(run.checkpoints).list()), None)
    if newest is not None:
        known = newest.manifest.meta.get("dataset_id")
    else:
        known = read_manifest(Path(path)).id if path and Path(path, MANIFEST).is_file() else None
    found = read_manifest(folder).id
    if known not in (None, found):
        raise UsageError(
            f"{folder} holds dataset {found[:12]}, and {run.run_id} was trained on {str(known)[:12]}: give "
            "its folder (`inspect DIR` shows the id)"
        )
    return None if newest is None else newest.manifest.meta.get("plan_hash")
