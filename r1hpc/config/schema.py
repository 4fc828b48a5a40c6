"""Every setting of a run, as frozen dataclasses. Units are in the names; `None` means "derived".

Each section is checked on its own by `__post_init__`; what needs the whole (batch arithmetic, memory)
is checked by `plan`. The YAML files in `configs/` and `jobs/` hold the same names.
"""

from dataclasses import Field, dataclass, field, is_dataclass
from enum import StrEnum
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import parse_time
from r1hpc.config.checks import at_least, one_of, positive, seed
from r1hpc.config.reasoning import (
    EvaluateConfig,
    GenerateConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
    TaskConfig,
)


class Precision(StrEnum):
    """Arithmetic of forward and backward. Master weights and moments stay fp32 in each."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(frozen=True)
class ModelConfig:
    """Any Hugging Face causal LM: from a local folder, or from scratch by its config."""

    path: str | None = None
    """Local folder with config.json and weights (safetensors), which are loaded unless `from_scratch`; a
    folder without them is refused."""
    config: dict[str, Any] = field(default_factory=dict)
    """A config.json written here (needs `model_type`), or changes to the one in `path`.
    `vocab_size` may be left out: the dataset's is taken."""
    from_scratch: bool = False
    """Random weights, of the architecture that `path` or `config` describes."""
    tokenizer: str | None = None
    """A tokenizer.json or the folder that holds one; `characters`: the small built-in vocabulary of the
    arithmetic tasks. None: the one in `path`. Pretraining needs none, its shards hold ids."""
    activation_checkpointing: bool = False
    """Activations are computed again in the backward pass: less memory, about a third more arithmetic."""
    attn_implementation: str = "sdpa"
    """What transformers calls it: eager, sdpa, flash_attention_2; or gate, gate_norm, sigmoid_bias, the
    article's dynamic attention gate and its relatives (train/attention.py). softmax is sdpa."""
    lora_rank: int = 0
    """0: all weights are trained. Else adapters of this rank, through peft."""
    lora_alpha: float = 16.0
    """The adapters are scaled by lora_alpha / lora_rank."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get adapters; empty: all linear layers but the head."""

    def __post_init__(self) -> None:
        at_least("model.lora_rank", self.lora_rank, 0)
        positive("model.lora_alpha", self.lora_alpha)
        if self.path is None and self.config and "model_type" not in self.config:
            raise ConfigError("model.config needs model_type (for example qwen2), or give model.path")


@dataclass(frozen=True)
class DataConfig:
    """A dataset made by `r1hpc shard build`, or the recipe to build it on first use."""

    path: str | None = None
    """Folder of the dataset. None: it is built from `traces`, else from `recipe`, beside the runs."""
    recipe: str | None = "smoke"
    """Name in shards/ or a file; used only where `path` is not given."""
    traces: list[str] = field(default_factory=list)
    """Stage sft: JSONL files of {"prompt", "completion"}, or folders of them; built into shards with roles
    on first use, where `path` is not given."""
    seq_len: int = 256
    """Tokens of a sample; a longer trace is refused."""
    seed: int = 0
    """Keys the order of samples; independent of train.seed."""
    verify: str = "once"
    """`once`: each chunk's checksum on first touch; `every`: on every read."""

    def __post_init__(self) -> None:
        at_least("data.seq_len", self.seq_len, 2)
        seed("data.seed", self.seed)
        one_of("data.verify", self.verify, ("once", "every"))
        if self.path is None and self.recipe is None and not self.traces:
            raise ConfigError("give data.path=DIR (made by `r1hpc shard build`) or data.recipe=NAME")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. global_batch_size never changes with the number of nodes; accumulation does."""

    num_steps: int = 100
    """Optimizer steps of the whole run, over all attempts."""
    global_batch_size: int = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Sequences per rank and forward pass."""
    gradient_accumulation_steps: int | None = None
    """Derived from the batch and the world size; when given it must agree."""
    lr: float = 3e-4
    """The peak, reached after warmup_steps."""
    min_lr_fraction: float = 0.1
    """The cosine ends at lr x this."""
    warmup_steps: int = 10
    """A run shorter than this ends while it warms up."""
    weight_decay: float = 0.1
    """AdamW's, on every parameter."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's, in the denominator."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    stop_grad_norm: float = 1e4
    """A gradient norm above this (before clipping), or one that is not finite, ends the run."""
    max_skipped_steps: int = 20
    """fp16: this many overflows in a row (the loss scale has found no floor) end the run."""
    precision: Precision = Precision.bf16
    """Arithmetic of forward and backward; master weights and moments stay fp32."""
    seed: int = 0
    """Weights and dropout. Every rank has its own stream derived from it."""
    hang_timeout_s: float = 1800.0
    """No progress for this long: stacks are dumped, the attempt ends and is requeued."""
    print_every: int = 10
    """Steps between two lines in the log of rank 0."""

    def __post_init__(self) -> None:
        counts = ("num_steps", "global_batch_size", "micro_batch_size", "print_every", "max_skipped_steps")
        for name in counts:
            at_least(f"train.{name}", getattr(self, name), 1)
        if self.gradient_accumulation_steps is not None:
            at_least("train.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        at_least("train.warmup_steps", self.warmup_steps, 0)
        seed("train.seed", self.seed)
        for name in ("lr", "max_grad_norm", "stop_grad_norm", "hang_timeout_s", "eps"):
            positive(f"train.{name}", getattr(self, name))
        if not 0 <= self.min_lr_fraction <= 1:
            raise ConfigError(f"train.min_lr_fraction is {self.min_lr_fraction}: it must lie in 0..1")


@dataclass(frozen=True)
class DeepspeedConfig:
    """Settings of DeepSpeed. The batch sizes, precision and schedule come from `train`."""

    zero_stage: int = 1
    """0: nothing is sharded over ranks; 1: optimizer states; 2: and gradients; 3: and weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's own config, under DeepSpeed's names; wins over what r1hpc sets."""

    def __post_init__(self) -> None:
        one_of("deepspeed.zero_stage", self.zero_stage, (0, 1, 2, 3))


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep."""

    save_every: int = 500
    """Steps between periodic saves. This is what a crash can cost."""
    keep: int = 2
    """Verified checkpoints kept; never fewer than 2, since the last may be the bad one."""
    assumed_bandwidth_gib_s: float = 1.0
    """File system bandwidth per run, for the save time printed before anything was measured."""

    def __post_init__(self) -> None:
        at_least("checkpoint.save_every", self.save_every, 1)
        if self.keep < 2:
            raise ConfigError(f"checkpoint.keep is {self.keep}: keep at least 2, the last may be the bad one")
        positive("checkpoint.assumed_bandwidth_gib_s", self.assumed_bandwidth_gib_s)


@dataclass(frozen=True)
class MonitorConfig:
    """NVML sampling on every node."""

    enabled: bool = True
    """False: nothing is read of the GPUs."""
    period_s: float = 5.0
    """At least 0.5: NVML renews its power reading about twice a second. Eight GPUs write 4 kB a sample."""

    def __post_init__(self) -> None:
        if self.period_s < 0.5:
            raise ConfigError(f"monitor.period_s is {self.period_s}: NVML has nothing new below 0.5 s")


@dataclass(frozen=True)
class LimitsConfig:
    """How many attempts may end by each cause before the run is left alone. -1: no limit.

    Counted since the last new checkpoint: a run that gets on is not ended by what it met long ago.
    """

    max_preemptions: int = -1
    """Attempts that Slurm ended for another job."""
    max_timeouts: int = -1
    """Attempts that reached the time limit."""
    max_node_failures: int = 5
    """Attempts that lost a node."""
    max_crashes: int = 1
    """Attempts that failed by themselves."""
    max_ooms: int = 0
    """Attempts that ran out of GPU or host memory."""
    max_hangs: int = 3
    """Attempts without progress for train.hang_timeout_s."""
    max_attempts_without_checkpoint: int = 3
    """Attempts in a row that made no new checkpoint; then the run stops, whatever the cause. Those that were
    preempted or lost a node before their first step do not count."""
    max_gpu_hours: float | None = None
    """GPU-hours of all attempts together; when they are used up the run saves and stops for good."""

    def __post_init__(self) -> None:
        at_least("limits.max_attempts_without_checkpoint", self.max_attempts_without_checkpoint, 1)


@dataclass(frozen=True)
class ResourcesConfig:
    """What is asked of Slurm, under sbatch's own names. `None` is left to the cluster profile."""

    nodes: int = 1
    """sbatch --nodes."""
    gpus_per_node: int | None = None
    """GPUs, and so ranks, per node. 0: a CPU run with `ranks_per_node`. None: the profile's, then probed."""
    ranks_per_node: int = 1
    """Ranks per node of a CPU run."""
    time: str | None = None
    """Slurm's notation, D-HH:MM:SS. None: the partition's limit."""
    job_name: str | None = None
    """sbatch --job-name. None: the name of the run."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    cpus_per_task: int | None = None
    """sbatch --cpus-per-task: cores of a rank."""
    mem: str | None = None
    """sbatch --mem, of a node; 0: all of it."""
    constraint: str | None = None
    """sbatch --constraint."""
    exclude: str | None = None
    """sbatch --exclude: nodes not to be used."""
    nodelist: str | None = None
    """sbatch --nodelist: nodes to be used."""
    dependency: str | None = None
    """sbatch --dependency."""
    reservation: str | None = None
    """sbatch --reservation."""
    comment: str | None = None
    """sbatch --comment."""
    mail_type: str | None = None
    """sbatch --mail-type."""
    mail_user: str | None = None
    """sbatch --mail-user."""
    exclusive: bool = False
    """sbatch --exclusive: whole nodes."""
    signal_lead_s: int | None = None
    """Seconds before the time limit at which the run is warned. None: from the expected save time."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Any other sbatch option, by its long name without dashes; an empty value is a bare flag."""

    def __post_init__(self) -> None:
        at_least("resources.nodes", self.nodes, 1)
        at_least("resources.ranks_per_node", self.ranks_per_node, 1)
        if self.gpus_per_node is not None:
            at_least("resources.gpus_per_node", self.gpus_per_node, 0)
        if self.cpus_per_task is not None:
            at_least("resources.cpus_per_task", self.cpus_per_task, 1)
        if self.time is not None and parse_time(self.time) == 0:
            raise ConfigError("resources.time is 0: give a time limit such as 12:00:00")


@dataclass(frozen=True)
class ClusterConfig:
    """What a site needs, from configs/cluster/<name>.yaml. What it leaves out is probed."""

    name: str = "default"
    """A label of the profile, for people."""
    partition: str | None = None
    """Where resources.partition is not given."""
    account: str | None = None
    """Where resources.account is not given."""
    qos: str | None = None
    """Where resources.qos is not given."""
    gpus_per_node: int | None = None
    """Where resources.gpus_per_node is not given."""
    gpu_type: str | None = None
    """For the estimate and MFU, for example a100-80gb. None: asked of the GPU itself."""
    cpus_per_task: int | None = None
    """Where resources.cpus_per_task is not given."""
    mem: str | None = None
    """Where resources.mem is not given."""
    network_interface: str | None = None
    """For NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME. None: the interface that leads to rank 0."""
    setup: list[str] = field(default_factory=list)
    """Shell lines run before anything else in the job: `module load …`, `source …/activate`.
    They are shell on purpose and come only from a profile file you wrote, never from a flag."""
    python: str | None = None
    """The interpreter on the nodes. None: the one that submits."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables exported to the job."""


@dataclass(frozen=True)
class RunConfig:
    """One run, whole."""

    stage: str = "pretrain"
    """pretrain; traces: demonstrations of a task; sft: on completions; rl: GRPO or PPO; generate: the model's
    own completions, filtered (rejection sampling); evaluate."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        one_of("stage", self.stage, STAGES)
        if self.stage == "pretrain" and self.model.lora_rank:
            raise ConfigError(
                "model.lora_rank has no use in stage pretrain, which trains all weights: remove it"
            )
        if self.stage == "rl":
            self._check_rl()

    def _check_rl(self) -> None:
        num = self.rollout.num_generations
        if num < 2 and (self.rl.algorithm == "grpo" or self.rl.max_resamples):
            raise ConfigError(
                f"rollout.num_generations is {num}: GRPO compares the completions of a prompt with each "
                "other, and needs 2 at least"
            )
        if self.rl.algorithm == "ppo" and self.model.lora_rank:
            raise ConfigError(
                "rl.algorithm=ppo trains a critic with all its weights, which model.lora_rank is to avoid: "
                "take rl.algorithm=grpo, or model.lora_rank=0"
            )
        if self.train.gradient_accumulation_steps is not None:
            raise ConfigError(
                "train.gradient_accumulation_steps has no use in stage rl, where it follows from what a "
                "rollout leaves to train on: remove it, and set train.micro_batch_size"
            )


def section_of(setting: "Field[Any]") -> type | None:
    """The dataclass of a field that is a section of its own; None: it is a setting."""
    factory = setting.default_factory
    return factory if isinstance(factory, type) and is_dataclass(factory) else None


STAGES = ("pretrain", "traces", "sft", "rl", "generate", "evaluate")
