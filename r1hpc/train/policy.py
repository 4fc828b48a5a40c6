"""The networks of an RL run: the policy, the reference that the KL is taken to, and what samples."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from r1hpc.config.schema import Precision, RunConfig
from r1hpc.tasks.tokenizer import SpecialIds
from r1hpc.train.critic import ActorCritic
from r1hpc.train.loop import Job
from r1hpc.train.lora import reference as without_adapters
from r1hpc.train.lora import wrap_lora
from r1hpc.train.model import build_model, cast_parameters
from r1hpc.train.sampling import RolloutEngine, TorchSampler
from r1hpc.train.update import Reference

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.fp32: torch.float32}


def build_policy(config: RunConfig, hf_config: dict[str, Any]) -> Any:
    """The network that is trained, with adapters where they are asked for."""
    policy = build_model(config.model, hf_config, config.train.seed)
    return wrap_lora(policy, config.model) if config.model.lora_rank else policy


def policy_of(engine: Any) -> Any:
    """The language model inside the engine."""
    return engine.module.policy if isinstance(engine.module, ActorCritic) else engine.module


def build_reference(job: Job, hf_config: dict[str, Any]) -> Reference | None:
    """What the KL is taken to: the weights the run starts from. None where nobody asks for it."""
    config = job.config
    if config.rl.kl_coef == 0:
        return None
    if config.model.lora_rank:

        @contextmanager
        def adapters_off(network: Any) -> Iterator[Any]:
            policy = network.policy if isinstance(network, ActorCritic) else network
            with without_adapters(policy):
                yield policy

        return Reference(None, _weights_id(config), adapters_off)
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
