"""The sections of a run that samples: its task, rewards, rollouts, algorithm, generation and evaluation."""

from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.checks import at_least, one_of, positive, seed


@dataclass(frozen=True)
class TaskConfig:
    """Questions with a verifiable answer. Item `index` is a pure function of (seed, index)."""

    name: str = "chain_sum"
    """chain_sum, countdown, jsonl, or reasoning_gym:NAME for any of its generators."""
    seed: int = 0
    """Another seed asks other questions."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task itself, for example num_terms; `path` for jsonl."""

    def __post_init__(self) -> None:
        seed("task.seed", self.seed)


@dataclass(frozen=True)
class RewardConfig:
    """reward = sum of weight x term. Every term is logged by itself."""

    terms: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 0.1})
    """accuracy, format, language, efficiency_tokens, efficiency_flops, diversity."""
    gate_format: bool = True
    """No format reward in a group whose members differ in nothing but format."""
    timeout_s: float = 2.0
    """For one answer's verification; then the verifier is killed, the answer counts as wrong."""

    def __post_init__(self) -> None:
        positive("reward.timeout_s", self.timeout_s)
        if not self.terms:
            raise ConfigError("reward.terms is empty: give at least accuracy: 1.0")


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: str = "sampler"
    """sampler: the training model itself with a KV cache; vllm: the optional extra, on GPUs."""
    num_prompts: int = 32
    """Prompts per rollout, over all ranks."""
    num_generations: int = 8
    """Completions per prompt: a group."""
    max_prompt_length: int = 64
    """Tokens; a longer prompt is refused."""
    max_completion_length: int = 64
    """Tokens; a completion that has not ended by then is truncated."""
    temperature: float = 1.0
    """Logits are divided by it, in sampling and in the loss."""
    prompts_per_batch: int = 0
    """Prompts that one rank decodes together, each num_generations (stages generate, evaluate: num_samples)
    times: it bounds the KV cache, and a finished batch survives a preemption. 0: the rank's whole share."""
    poll_every: int = 16
    """Decoded tokens between two looks at whether somebody asked to stop."""
    vllm_options: dict[str, Any] = field(default_factory=dict)
    """Handed to vllm.LLM under its names, over what r1hpc sets; for example gpu_memory_utilization (0.3)."""
    max_logprob_difference: float = 0.5
    """Largest mean difference (nats) between the sampler's and the trainer's log-probabilities."""

    def __post_init__(self) -> None:
        one_of("rollout.engine", self.engine, ("sampler", "vllm"))
        for name in ("num_prompts", "max_prompt_length", "max_completion_length", "poll_every"):
            at_least(f"rollout.{name}", getattr(self, name), 1)
        at_least("rollout.num_generations", self.num_generations, 1)
        at_least("rollout.prompts_per_batch", self.prompts_per_batch, 0)
        positive("rollout.temperature", self.temperature)
        positive("rollout.max_logprob_difference", self.max_logprob_difference)


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning with verifiable rewards. Defaults are GRPO's; presets in configs/rl/."""

    algorithm: str = "grpo"
    """grpo: advantages within a group; ppo: a critic and GAE."""
    num_iterations: int = 1
    """Passes over a rollout. Each makes num_prompts x num_generations / train.global_batch_size updates."""
    scale_advantage: bool = True
    """Divide by the group's standard deviation (GRPO); false is Dr. GRPO's choice."""
    loss_level: str = "token"
    """token: mean over all tokens of the step (DAPO); sequence: mean of each completion's mean (GRPO);
    constant: sum over tokens / (completions x max_completion_length) (Dr. GRPO)."""
    clip_low: float = 0.2
    """The ratio to the old policy is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = 0.2
    """Above clip_low it is DAPO's clip-higher, 0.28."""
    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(policy, reference). 0: no reference is held."""
    mask_truncated: bool = False
    """Completions that hit max_completion_length are left out of the loss (DAPO's overlong filtering)."""
    max_resamples: int = 0
    """Dynamic sampling: groups without variance are replaced, in at most so many further rollouts a step."""
    gamma: float = 1.0
    """PPO: discount per token."""
    gae_lambda: float = 0.95
    """PPO: of generalised advantage estimation."""
    critic_lr: float = 1e-5
    """PPO: the critic's peak learning rate, on the schedule of train.lr."""
    value_coef: float = 0.5
    """PPO: weight of the critic's loss."""
    value_clip: float = 0.2
    """PPO: how far a value may move from the old one before its loss is clipped."""

    def __post_init__(self) -> None:
        one_of("rl.algorithm", self.algorithm, ("grpo", "ppo"))
        one_of("rl.loss_level", self.loss_level, ("token", "sequence", "constant"))
        at_least("rl.num_iterations", self.num_iterations, 1)
        at_least("rl.max_resamples", self.max_resamples, 0)
        for name in ("clip_low", "clip_high", "critic_lr", "value_clip"):
            positive(f"rl.{name}", getattr(self, name))
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"rl.{name} is {getattr(self, name)}: it must lie in 0..1")
        for name in ("kl_coef", "value_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"rl.{name} is {getattr(self, name)}: it must be 0 or more")


@dataclass(frozen=True)
class GenerateConfig:
    """Stages traces, generate and evaluate: how many items, and what is kept of them."""

    num_items: int = 1000
    """Task items, from `first_item` on."""
    first_item: int = 0
    """Index of the first item."""
    held_out: bool = False
    """Items of the held-out part instead of the training part; evaluate always takes the held-out part."""
    num_samples: int = 1
    """Completions per item at `rollout.temperature`."""
    items_per_part: int = 256
    """A finished part is kept by a preemption."""
    keep: str = "all"
    """all; correct; best: the one of highest reward of each item, if it is correct."""
    max_pass_rate: float = 1.0
    """Items the model solves more often than this are left out: they teach nothing."""
    thinking_share: float = 0.3
    """Stage traces: share of demonstrations that show their thinking."""

    def __post_init__(self) -> None:
        for name in ("num_items", "num_samples", "items_per_part"):
            at_least(f"generate.{name}", getattr(self, name), 1)
        at_least("generate.first_item", self.first_item, 0)
        one_of("generate.keep", self.keep, ("all", "correct", "best"))
        for name in ("max_pass_rate", "thinking_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"generate.{name} is {getattr(self, name)}: it must lie in 0..1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on held-out items: greedy, and pass@k from n samples (Chen et al., arXiv 2107.03374)."""

    every: int = 0
    """Stage rl: steps between evaluations. 0: only before the first and after the last step."""
    num_items: int = 256
    """Held-out questions; refused where the task has fewer."""
    num_samples: int = 8
    """Samples per item at `rollout.temperature`; pass@k is reported for k = 1, 2, 4 ... num_samples."""

    def __post_init__(self) -> None:
        at_least("evaluate.every", self.every, 0)
        at_least("evaluate.num_items", self.num_items, 1)
        at_least("evaluate.num_samples", self.num_samples, 1)
