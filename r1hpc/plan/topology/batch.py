"""Split a global batch over ranks, and decide which policy an update's ratios refer to.

    global_batch_size = num_nodes x ranks_per_node x micro_batch_size x gradient_accumulation_steps
    corrects_importance(config)      # the sampler's log-probabilities differ from the trainer's
    works_out_old_policy(config)     # a pass over each rollout before its updates

Ranks that share their sequences (train.sequence_parallel) count as one. The global batch is part of the
training and never changes; nodes, micro batch and accumulation may.
"""

import math
from dataclasses import dataclass

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.config.stages import in_parts, is_rl, is_server, trains
from r1hpc.plan.topology.parts import part_size

_CHOICES_SHOWN = 8
_MOST_NODES = 10_000
"""Choices beyond are not searched: an absurd number of nodes is answered at once."""


@dataclass(frozen=True)
class Topology:
    """The ranks' nodes: one rank per GPU, or `ranks_per_node` on the CPUs if gpus_per_node is 0. A server is
    one rank with all GPUs of its node."""

    num_nodes: int
    ranks_per_node: int
    gpus_per_node: int
    """0: a CPU run."""

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1 or self.gpus_per_node < 0:
            raise ConfigError(f"no such topology: {self.num_nodes} nodes of {self.ranks_per_node} ranks")
        if self.gpus_per_node not in (0, self.ranks_per_node) and self.ranks_per_node != 1:
            raise ConfigError(
                f"{self.ranks_per_node} ranks on {self.gpus_per_node} GPUs a node: "
                "a GPU run has one rank per GPU"
            )

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class BatchPlan:
    """Sequences per optimizer step, per rank and forward pass, and forward passes per step."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int


def solve_batch(
    global_batch_size: int,
    micro_batch_size: int,
    world_size: int,
    gradient_accumulation_steps: int | None = None,
    ranks_per_node: int = 1,
    sequence_parallel: int = 1,
    max_nodes: int | None = None,
) -> BatchPlan:
    """Return the accumulation that gives the global batch exactly, else raise ConfigError with legal choices.

    Args:
        gradient_accumulation_steps: derived if None, else checked.
        ranks_per_node: only for the choices an error lists.
        sequence_parallel: ranks that share their sequences; divides the ranks.
        max_nodes: available nodes, for an error; None: unknown.
    """
    groups, groups_per_node = world_size // sequence_parallel, max(1, ranks_per_node // sequence_parallel)
    per_pass = groups * micro_batch_size
    steps, rest = divmod(global_batch_size, per_pass)
    if not rest and steps and gradient_accumulation_steps in (None, steps):
        return BatchPlan(global_batch_size, micro_batch_size, steps)
    shared = f" / train.sequence_parallel {sequence_parallel}" if sequence_parallel > 1 else ""
    asked = f"{world_size} ranks{shared} x train.micro_batch_size {micro_batch_size}"
    if gradient_accumulation_steps is not None:
        asked += f" x train.gradient_accumulation_steps {gradient_accumulation_steps}"
        per_pass *= gradient_accumulation_steps
    relation = f"is {per_pass}" if gradient_accumulation_steps else f"= {per_pass} does not divide it"
    nodes = world_size // ranks_per_node
    most = min(max(2 * nodes, nodes + 4), global_batch_size // groups_per_node, max_nodes or _MOST_NODES)
    legal = legal_topologies(global_batch_size, groups_per_node, min(most, _MOST_NODES))
    choices = _nearest_choices(legal, nodes, micro_batch_size, groups_per_node, sequence_parallel)
    raise ConfigError(f"train.global_batch_size is {global_batch_size}, but {asked} {relation}. {choices}")


def ranks_per_node(config: RunConfig, gpus_per_node: int) -> int:
    """Return one rank per GPU; a CPU run sets its own number; a server is one."""
    return 1 if is_server(config.stage) else gpus_per_node or config.resources.ranks_per_node


def batch_of(config: RunConfig, topology: Topology, max_nodes: int | None = None) -> BatchPlan:
    """Return the batch of a run, by its stage; raise ConfigError if no accumulation gives it.

    An RL step trains on completions, of which a rollout yields num_prompts x num_generations; its micro
    batches depend on how many the rollout kept, so they need not divide anything. The stages without
    optimizer steps have parts.
    """
    train, rollout = config.train, config.rollout
    if in_parts(config.stage):
        size = part_size(config, topology.world_size)
        return BatchPlan(size, size, 1)
    if not trains(config.stage):
        return BatchPlan(1, 1, 1)  # the workload makes its own batches
    if not is_rl(config.stage):
        return solve_batch(
            train.global_batch_size,
            train.micro_batch_size,
            topology.world_size,
            train.gradient_accumulation_steps,
            topology.ranks_per_node,
            train.sequence_parallel,
            max_nodes,
        )
    completions = rollout.num_prompts * rollout.num_generations
    if completions % train.global_batch_size or train.global_batch_size % rollout.num_generations:
        raise ConfigError(
            f"train.global_batch_size is {train.global_batch_size}, but a rollout has rollout.num_prompts "
            f"{rollout.num_prompts} x rollout.num_generations {rollout.num_generations} = {completions} "
            f"completions: it must divide that, in whole groups; {completions} makes one update a rollout"
        )
    at_once = topology.world_size * train.micro_batch_size
    return BatchPlan(train.global_batch_size, train.micro_batch_size, -(-train.global_batch_size // at_once))


def updates_per_rollout(config: RunConfig) -> int:
    """Return the optimizer steps of stage rl between two rollouts."""
    rollout, rl = config.rollout, config.rl
    completions = rollout.num_prompts * rollout.num_generations
    return max(1, rl.num_iterations * completions // config.train.global_batch_size)


def legal_topologies(
    global_batch_size: int, ranks_per_node: int, max_nodes: int
) -> list[tuple[int, int, int]]:
    """Return every (nodes, micro batch, accumulation) up to `max_nodes` with this global batch, sorted. Empty
    if `ranks_per_node` does not divide the global batch."""
    found = []
    for nodes in range(1, max_nodes + 1):
        per_rank, rest = divmod(global_batch_size, nodes * ranks_per_node)
        if not rest and per_rank:
            found += [(nodes, micro, per_rank // micro) for micro in _divisors(per_rank)]
    return found


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _nearest_choices(
    legal: list[tuple[int, int, int]], nodes: int, micro_batch: int, groups: int, sequence_parallel: int
) -> str:
    ranks = f"{groups * sequence_parallel}"
    shared = f", {sequence_parallel} to a sequence" if sequence_parallel > 1 else ""
    if not legal:
        return (
            f"No number of nodes with {ranks} ranks each divides it: take a multiple of "
            f"{groups} (this changes the training) or other ranks per node."
        )

    def distance(choice: tuple[int, int, int]) -> tuple[float, tuple[int, int, int]]:
        return abs(math.log(choice[0] / max(nodes, 1))) + abs(math.log(choice[1] / micro_batch)), choice

    nearest = sorted(legal, key=distance)[:_CHOICES_SHOWN]
    listed = "; ".join(
        f"{n} node{'s' if n > 1 else ''}, micro batch {m}, accumulation {a}" for n, m, a in nearest
    )
    return f"Legal (ranks per node: {ranks}{shared}) are: {listed}"


def corrects_importance(config: RunConfig) -> bool:
    """True if truncated importance sampling is between sampler and trainer (rl.importance_sampling)."""
    asked, distills = config.rl.importance_sampling, config.rl.algorithm == "distill"
    is_other_policy = config.rollout.engine == "vllm" or config.rl.max_staleness > 0
    return asked == "truncated" or (asked == "auto" and is_other_policy and not distills)


def works_out_old_policy(config: RunConfig) -> bool:
    """True if the trainer computes the old policy's log-probabilities of a rollout.

    With one update per rollout the old policy is the trained one. With several the sampler's
    log-probabilities are enough, except with importance correction, and for GSPO in half precision: it clips
    the mean over a sequence to some 1e-4, and the sampler's bf16 is off by 1e-2 per token.
    """
    if config.rl.algorithm == "distill" or updates_per_rollout(config) == 1:
        return False
    sees_rounding = config.rl.ratio == "sequence" and config.train.precision is not Precision.fp32
    return corrects_importance(config) or sees_rounding
