"""Build the networks of an RL run: policy, PPO's critic, the KL's reference, and the sampling engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import torch
from torch import nn

from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.plan.memory.step import reference_place
from r1hpc.plan.model.shape import load_teacher_config, teacher_of
from r1hpc.tasks.text.tokenizer import SpecialIds
from r1hpc.train.checkpoint.identity import weights_id
from r1hpc.train.loop.session import Job
from r1hpc.train.model.model import build_model, wrap_lora
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.engine import Parameters, deepspeed_config, inference_config
from r1hpc.train.rollout.torch_engine import RolloutEngine, TorchSampler

DTYPES = {
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp32: torch.float32,
    Precision.fp8: torch.bfloat16,
}
"""dtype of the weights; FP8 is made from them for each matrix product."""


class ActorCritic(nn.Module):
    """The policy and PPO's critic, a second backbone with one number per token: (logits, values).

    They share one engine, so one checkpoint holds both and their optimizer states.
    """

    def __init__(self, policy: Any, critic: nn.Module) -> None:
        """`critic` has its own body: a shared one would be pulled by a loss of another scale."""
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: int, *, of_policy: bool = True, of_critic: bool = True
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Map (rows, seq_len) to logits (rows, kept, vocab) and values (rows, kept) of the last positions;
        None for a network that is not used."""
        logits = values = None
        if of_policy:
            logits = self.policy(input_ids=input_ids, logits_to_keep=logits_to_keep).logits
        if of_critic:
            hidden = self.critic(input_ids=input_ids).last_hidden_state[:, -logits_to_keep:]
            values = self.value_head(hidden)[..., 0]
        return logits, values

    def parameter_groups(self, config: RunConfig) -> Parameters:
        """Return the policy at train.lr and the critic at rl.critic_lr, both on train's schedule."""
        critic = [*self.critic.parameters(), *self.value_head.parameters()]
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad], "lr_scale": 1.0},
            {"params": critic, "lr_scale": config.rl.critic_lr / config.train.lr},
        ]


def build_policy(config: RunConfig, hf_config: dict[str, Any], lie: Placement | None = None) -> Any:
    """Return the network to train, with adapters if configured; `lie` as for build_model."""
    policy: Any = build_model(config.model, hf_config, config.train.seed, lie)
    if config.model.lora_rank:
        policy = wrap_lora(policy, config.model)
        if lie:
            lie.put_rest(policy)
    if config.train.precision is Precision.fp8:
        from r1hpc.train.model.low_precision import compute_in_fp8

        policy = compute_in_fp8(policy, config.train)
    return policy


def build_actor_critic(config: RunConfig, hf_config: dict[str, Any], lie: Placement) -> ActorCritic:
    """Return the policy and a critic with the same initial weights. These are loaded or drawn twice, because
    sharded weights cannot be copied."""
    policy = build_policy(config, hf_config, lie)
    network = ActorCritic(policy, build_policy(config, hf_config, lie).base_model)
    lie.put_rest(network)
    return network


def placement(config: RunConfig, group: Group, *, divided: bool) -> Placement:
    """Return how weights lie on this rank; `divided` over the ranks if they are trained that way."""
    sharding = None
    if divided and config.deepspeed.zero_stage == 3:
        size, on_gpu = group.world_size, group.device.type == "cuda"
        sharding = deepspeed_config(config, world_size=size, on_gpu=on_gpu, load_universal=False)
    return Placement(DTYPES[config.train.precision], group.device, sharding)


def policy_of(engine: Any) -> Any:
    """Return the language model inside an engine, or the model itself."""
    network = getattr(engine, "module", engine)
    return network.policy if isinstance(network, ActorCritic) else network


@dataclass(frozen=True)
class Reference:
    """The policy the trained one is pulled to: a teacher, or the run's starting weights.

    With LoRA the starting weights are the policy without its adapters; else a frozen model is held, see
    rl.reference.
    """

    network: Any
    """A model, or DeepSpeed's engine around a divided one; None with LoRA."""
    id: str

    @contextmanager
    def policy(self, engine: Any) -> Iterator[Any]:
        """Yield the network to run, inside the context."""
        if self.network is not None:
            yield self.network
            return
        policy = policy_of(engine)
        was_training = policy.training
        policy.eval()  # a reference has no dropout
        try:
            with policy.disable_adapter():
                yield policy
        finally:
            policy.train(was_training)


def build_reference(job: Job, hf_config: dict[str, Any]) -> Reference | None:
    """Return the teacher of rl.algorithm=distill, or the reference of rl.kl_coef; None without either.
    `hf_config` is that of the model that is trained."""
    config, where = job.config, reference_place(job.config)
    teacher = load_teacher_config(config)
    if teacher is not None:
        config, hf_config = replace(config, model=teacher_of(config, teacher)), teacher
    elif config.rl.kl_coef == 0:
        return None
    elif where == "none":
        return Reference(None, weights_id(config, job.group))
    lie = placement(config, job.group, divided=False)
    if where != "whole":
        asked = inference_config(config, world_size=job.group.world_size, on_host=where == "host")
        lie = replace(lie, sharding=asked)
    network = build_model(config.model, hf_config, config.train.seed, lie).requires_grad_(False).eval()
    if lie.sharding is None:
        return Reference(network, weights_id(config, job.group))
    engine, *_ = deepspeed.initialize(model=network, config=lie.sharding, dist_init_required=False)
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
