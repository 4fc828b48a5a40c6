"""The R1 chain on the device, its reinforcement learning killed once in a rollout and once in an update."""

import json
import os

from benchmarks.gpu.place import PieceError, Place, wait_until
from benchmarks.gpu.table import Table, number
from r1hpc.api import Chain, ChainSubmission, submit
from r1hpc.telemetry.records.evaluations import read_evaluations

_STAGE = "grpo"
_KILLS = "rollout.batch:kill9:0:3:1,update.begin:kill9:0:2:2"
"""In the first attempt, and in the second."""
_SMALL = (
    *("traces:generate.num_items=400", "traces:generate.items_per_part=200", "sft:train.num_steps=4"),
    *("sft:train.global_batch_size=16", "sft:train.micro_batch_size=16", "grpo:train.num_steps=4"),
    *("grpo:train.global_batch_size=16", "grpo:train.micro_batch_size=8", "grpo:rollout.num_prompts=4"),
    *("grpo:rollout.num_generations=4", "grpo:evaluate.num_items=8", "grpo:evaluate.num_samples=2"),
    *("reject:generate.num_items=16", "reject:generate.items_per_part=8", "sft2:train.num_steps=2"),
    *("sft2:train.global_batch_size=8", "sft2:train.micro_batch_size=8"),
)


def run(place: Place) -> list[Table]:
    chain = _start(place)
    wait_until("the end of the chain", lambda: chain.state().is_over, timeout_s=560)
    # In small nothing is answered right, and the stage after has nothing to learn from.
    judged = chain[_STAGE] if place.is_small else chain
    if judged.state().value != "finished":
        raise PieceError(f"the chain ended {chain.state().value}: see {chain.path}")
    rows = tuple(_row(chain, name) for name in chain)
    header = ("stage", "attempts ended", "steps", "greedy accuracy, first and last")
    return [Table("The R1 chain", header, rows, (f"Killed in stage {_STAGE} by R1HPC_FAILPOINT={_KILLS}",))]


def _start(place: Place) -> Chain:
    words = ["limits.max_crashes=5", "resources.ranks_per_node=1"]
    words += [f"resources.gpus_per_node={0 if place.is_small else 1}", *(_SMALL if place.is_small else ())]
    os.environ["R1HPC_FAILPOINT"] = _KILLS  # the other stages have no such places
    try:
        name = f"chain.{len(list(place.folder.glob('chain.*'))) + 1}"
        done = submit("r1", overrides=words, executor="local", run_root=place.folder, run_name=name)
    finally:
        del os.environ["R1HPC_FAILPOINT"]
    assert isinstance(done, ChainSubmission), "r1 is a chain"
    return done.chain


def _row(chain: Chain, name: str) -> tuple[str, ...]:
    run = chain[name]
    causes = ", ".join(attempt.cause.value if attempt.cause else "no end" for attempt in run.attempts)
    found = [line["greedy"]["value"] for line in read_evaluations(run.folder).values()]
    if run.folder.evaluation.is_file():
        found = [json.loads(run.folder.evaluation.read_text())["greedy"]["value"]]
    accuracy = " -> ".join(number(value) for value in dict.fromkeys((found[0], found[-1]))) if found else "-"
    return name, causes, str(len(run.metrics()) or "-"), accuracy
