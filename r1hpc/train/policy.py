"""The networks of an RL run: policy, PPO's critic, the reference for the KL, and the engine that samples."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r1hpc.config.schema import Precision, RunConfig
from r1hpc.tasks.tokenizer import SpecialIds
from r1hpc.train.engine import Parameters
from r1hpc.train.loop import Job
from r1hpc.train.model import build_model, cast_parameters, wrap_lora
from r1hpc.train.sampling import RolloutEngine, TorchSampler

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


class ActorCritic(nn.Module):
    """The policy and PPO's critic, a backbone of its own with one number per token: (logits, values).

    In one engine, so one checkpoint holds both and their optimizer states.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        # A copy: a critic that shares the policy's body pulls at it with a loss of another scale.
        self.critic = copy.deepcopy(policy.base_model)
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, seq_len) -> logits (rows, kept, vocab) and values (rows, kept) of the last positions."""
        logits = self.policy(input_ids=input_ids, logits_to_keep=logits_to_keep).logits
        hidden = self.critic(input_ids=input_ids).last_hidden_state[:, -logits_to_keep:]
        return logits, self.value_head(hidden)[..., 0]

    def parameter_groups(self, config: RunConfig) -> Parameters:
        """The policy at train.lr, the critic at rl.critic_lr, both on the schedule of train."""
        critic = [*self.critic.parameters(), *self.value_head.parameters()]
        return [
            {"params": [p for p in self.policy.parameters() if p.requires_grad], "lr_scale": 1.0},
            {"params": critic, "lr_scale": config.rl.critic_lr / config.train.lr},
        ]


def build_policy(config: RunConfig, hf_config: dict[str, Any]) -> Any:
    """The network that is trained, with adapters where they are asked for."""
    policy = build_model(config.model, hf_config, config.train.seed)
    return wrap_lora(policy, config.model) if config.model.lora_rank else policy


def policy_of(engine: Any) -> Any:
    """The language model inside the engine."""
    return engine.module.policy if isinstance(engine.module, ActorCritic) else engine.module


@dataclass(frozen=True)
class Reference:
    """The policy that the KL is taken to: the weights the run starts from.

    With LoRA they are the policy's own without its adapters; otherwise a frozen copy is held.
    """

    network: nn.Module | None
    """None with LoRA."""
    id: str
    """Names its weights."""

    @contextmanager
    def policy(self, engine: Any) -> Iterator[Any]:
        """The network to ask, inside the context."""
        if self.network is not None:
            yield self.network
            return
        policy = policy_of(engine)
        with policy.disable_adapter():
            yield policy


def build_reference(job: Job, hf_config: dict[str, Any]) -> Reference | None:
    """None where rl.kl_coef is 0."""
    config = job.config
    if config.rl.kl_coef == 0:
        return None
    if config.model.lora_rank:
        return Reference(None, _weights_id(config))
    network = build_model(config.model, hf_config, config.train.seed)
    # Not .to(dtype): that would round the rotary frequencies too, which the engine keeps in fp32.
    cast_parameters(network, DTYPES[config.train.precision])
    network.requires_grad_(False).eval().to(job.group.device)
    return Reference(network, _weights_id(config))


def build_rollout_engine(
    job: Job, hf_config: dict[str, Any], ids: SpecialIds, zero_stage: int
) -> RolloutEngine:
    """The engine that rollout.engine names, for weights that lie as `zero_stage` puts them."""
    config = job.config
    if config.rollout.engine == "vllm":
        from r1hpc.train.vllm_engine import VllmSampler

        return VllmSampler(job, ids)

    def replica() -> Any:
        # Building seeds torch's stream; dropout must go on from where it was.
        with torch.random.fork_rng():
            return build_policy(config, hf_config).to(DTYPES[config.train.precision])

    return TorchSampler(
        job.group,
        ids,
        zero_stage=zero_stage,
        replica=replica,
        poll_every=config.rollout.poll_every,
    )


def _weights_id(config: RunConfig) -> str:
    """Names the starting weights by their content; a model from scratch by its seed."""
    model = config.model
    if model.path is None or model.from_scratch:
        return f"from scratch, seed {config.train.seed}"
    digest = hashlib.sha256()
    for path in sorted(Path(model.path).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]
