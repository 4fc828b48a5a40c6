"""Build the network that a stage trains, and for RL the KL's reference or a teacher, and the sampling engine.

Pretraining and SFT use `build_policy` and `placement`; generate and evaluate use `placement` and the engine.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import deepspeed
import torch

from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.plan.memory.step import reference_place
from r1hpc.plan.model.shape import load_teacher_config, teacher_of
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.checkpoint.identity import weights_id
from r1hpc.train.loop.session import Job
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import deepspeed_config, inference_config
from r1hpc.train.rollout.torch_engine import RolloutEngine, TorchSampler

DTYPES = {
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp32: torch.float32,
    Precision.fp8: torch.bfloat16,
}
"""dtype of the weights; FP8 is made from them for each matrix product."""


def build_policy(config: RunConfig, hf_config: dict[str, Any], place: Placement | None = None) -> Any:
    """Return the network to train, with adapters if configured; `place` as for build_model."""
    policy: Any = build_model(config.model, hf_config, config.train.seed, place)
    if config.model.lora_rank:
        policy = wrap_lora(policy, config.model)
        if place:
            place.put_rest(policy)
    if config.train.precision is Precision.fp8:
        from r1hpc.train.model.low_precision import compute_in_fp8

        policy = compute_in_fp8(policy, config.train)
    return policy


def placement(config: RunConfig, group: Group, *, divided: bool) -> Placement:
    """Return how weights lie on this rank; `divided` over the ranks if they are trained that way."""
    sharding = None
    if divided and config.deepspeed.zero_stage == 3:
        size, on_gpu = group.world_size, group.device.type == "cuda"
        sharding = deepspeed_config(config, world_size=size, on_gpu=on_gpu, load_universal=False)
    return Placement(DTYPES[config.train.precision], group.device, sharding)


@dataclass(frozen=True)
class Reference:
    """The policy the trained one is pulled to: a teacher, or the run's starting weights.

    With LoRA the starting weights are the policy without its adapters; else a frozen model is held, see
    rl.reference.
    """

    network: Any
    """A frozen model, DeepSpeed's engine around a divided one, or with LoRA the policy."""
    id: str
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    """The network is the reference inside it."""

    @property
    def model(self) -> Any:
        """Return the language model, also from inside an engine."""
        return getattr(self.network, "module", self.network)


@contextmanager
def without_adapters(policy: Any) -> Iterator[None]:
    """Inside, a policy with LoRA adapters computes what it did before training, without dropout."""
    was_training = policy.training
    policy.eval()
    try:
        with policy.disable_adapter():
            yield
    finally:
        policy.train(was_training)


def build_reference(job: Job, hf_config: dict[str, Any], policy: Any = None) -> Reference | None:
    """Return the teacher of rl.algorithm=distill, or the reference of rl.kl_coef; None without either.
    `policy` is the model that is trained, needed with LoRA; `hf_config` is its config.json."""
    config, where = job.config, reference_place(job.config)
    teacher = load_teacher_config(config)
    if teacher is not None:
        config, hf_config = replace(config, model=teacher_of(config, teacher)), teacher
    elif config.rl.kl_coef == 0:
        return None
    elif where == "none":
        return Reference(policy, weights_id(config, job.group), partial(without_adapters, policy))
    place = placement(config, job.group, divided=False)
    if where != "whole":
        asked = inference_config(config, world_size=job.group.world_size, on_host=where == "host")
        place = replace(place, sharding=asked)
    network = build_model(config.model, hf_config, config.train.seed, place).requires_grad_(False).eval()
    if place.sharding is None:
        return Reference(network, weights_id(config, job.group))
    engine, *_ = deepspeed.initialize(model=network, config=place.sharding, dist_init_required=False)
    engine.eval()
    return Reference(engine, weights_id(config, job.group))


def build_rollout_engine(
    job: Job, hf_config: dict[str, Any], ids: SpecialIds, zero_stage: int
) -> RolloutEngine:
    """Return the engine that rollout.engine names, for weights laid out by `zero_stage`."""
    config = job.config
    if config.rollout.engine == "vllm":
        from r1hpc.train.rollout.vllm_engine import VllmSampler

        return VllmSampler(job, ids)

    def replica() -> Any:
        # Building seeds torch's random stream; dropout must continue where it was.
        with torch.random.fork_rng():
            return build_policy(config, hf_config, placement(config, job.group, divided=False))

    every = config.rollout.poll_every
    return TorchSampler(job.group, ids, zero_stage=zero_stage, replica=replica, poll_every=every)
