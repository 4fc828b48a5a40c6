"""Everything a run can be told, as frozen dataclasses. Units are in the names; `None` means "derived".

Each section is checked on its own by `__post_init__`; what needs the whole (batch arithmetic, memory)
is checked by `plan`. The YAML files in `configs/` and `jobs/` hold the same names.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import parse_time


class Precision(StrEnum):
    """Arithmetic of forward and backward. Master weights and moments stay fp32 in each."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@dataclass(frozen=True)
class ModelConfig:
    """Any Hugging Face causal LM: from a local folder, or from scratch by its config."""

    path: str | None = None
    """Local folder with config.json; weights (safetensors) in it are loaded unless `from_scratch`."""
    config: dict[str, Any] = field(default_factory=dict)
    """A config.json written here (needs `model_type`), or changes to the one in `path`.
    `vocab_size` may be left out: the dataset's is taken."""
    from_scratch: bool = False
    activation_checkpointing: bool = False
    attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        if self.path is None and self.config and "model_type" not in self.config:
            raise ConfigError("model.config needs model_type (for example qwen2), or give model.path")


@dataclass(frozen=True)
class DataConfig:
    """A dataset made by `r1hpc shard build`, or the recipe to build it on first use."""

    path: str | None = None
    recipe: str | None = "smoke"
    """Name in shards/ or a file; used only where `path` is not given."""
    seq_len: int = 256
    seed: int = 0
    """Keys the order of samples; independent of train.seed."""
    verify: str = "once"
    """`once`: each chunk's checksum on first touch; `every`: on every read."""

    def __post_init__(self) -> None:
        _at_least("data.seq_len", self.seq_len, 2)
        _seed("data.seed", self.seed)
        _one_of("data.verify", self.verify, ("once", "every"))
        if self.path is None and self.recipe is None:
            raise ConfigError("give data.path=DIR (made by `r1hpc shard build`) or data.recipe=NAME")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. global_batch_size never changes with the number of nodes; accumulation does."""

    num_steps: int = 100
    global_batch_size: int = 32
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 4
    """Sequences per rank and forward pass."""
    gradient_accumulation_steps: int | None = None
    """Derived from the batch and the world size; when given it must agree."""
    lr: float = 3e-4
    min_lr_fraction: float = 0.1
    """The cosine ends at lr x this."""
    warmup_steps: int = 10
    """A run shorter than this ends while it warms up."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    stop_grad_norm: float = 1e4
    """A gradient norm above this (before clipping), or one that is not finite, ends the run."""
    max_skipped_steps: int = 20
    """fp16: this many overflows in a row (the loss scale has found no floor) end the run."""
    precision: Precision = Precision.bf16
    seed: int = 0
    """Weights and dropout. Every rank has its own stream derived from it."""
    hang_timeout_s: float = 1800.0
    """No progress for this long: stacks are dumped, the attempt ends and is requeued."""
    print_every: int = 10

    def __post_init__(self) -> None:
        counts = ("num_steps", "global_batch_size", "micro_batch_size", "print_every", "max_skipped_steps")
        for name in counts:
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.gradient_accumulation_steps is not None:
            _at_least("train.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _at_least("train.warmup_steps", self.warmup_steps, 0)
        _seed("train.seed", self.seed)
        for name in ("lr", "max_grad_norm", "stop_grad_norm", "hang_timeout_s", "eps"):
            _positive(f"train.{name}", getattr(self, name))
        if not 0 <= self.min_lr_fraction <= 1:
            raise ConfigError(f"train.min_lr_fraction is {self.min_lr_fraction}: it must lie in 0..1")


@dataclass(frozen=True)
class DeepspeedConfig:
    """What DeepSpeed is told. The batch sizes, precision and schedule come from `train`."""

    zero_stage: int = 1
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's own config, under DeepSpeed's names; wins over what r1hpc sets."""

    def __post_init__(self) -> None:
        _one_of("deepspeed.zero_stage", self.zero_stage, (0, 1, 2, 3))


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
        _at_least("checkpoint.save_every", self.save_every, 1)
        if self.keep < 2:
            raise ConfigError(f"checkpoint.keep is {self.keep}: keep at least 2, the last may be the bad one")
        _positive("checkpoint.assumed_bandwidth_gib_s", self.assumed_bandwidth_gib_s)


@dataclass(frozen=True)
class MonitorConfig:
    """NVML sampling on every node."""

    enabled: bool = True
    period_s: float = 5.0
    """At least 0.5: NVML renews its power reading about twice a second. Eight GPUs write 4 kB a sample."""

    def __post_init__(self) -> None:
        if self.period_s < 0.5:
            raise ConfigError(f"monitor.period_s is {self.period_s}: NVML has nothing new below 0.5 s")


@dataclass(frozen=True)
class LimitsConfig:
    """How many attempts may end by each cause before the run is left alone. -1: no limit."""

    max_preemptions: int = -1
    max_timeouts: int = -1
    max_node_failures: int = 5
    max_crashes: int = 1
    max_ooms: int = 0
    max_hangs: int = 3
    max_attempts_without_checkpoint: int = 3
    """Attempts in a row that made no new checkpoint; then the run stops, whatever the cause."""

    def __post_init__(self) -> None:
        _at_least("limits.max_attempts_without_checkpoint", self.max_attempts_without_checkpoint, 1)


@dataclass(frozen=True)
class ResourcesConfig:
    """What is asked of Slurm, under sbatch's own names. `None` is left to the cluster profile."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """GPUs, and so ranks, per node. 0: a CPU run with `ranks_per_node`. None: the profile's, then probed."""
    ranks_per_node: int = 1
    """Ranks per node of a CPU run."""
    time: str | None = None
    """Slurm's notation, D-HH:MM:SS. None: the partition's limit."""
    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    dependency: str | None = None
    reservation: str | None = None
    comment: str | None = None
    mail_type: str | None = None
    mail_user: str | None = None
    exclusive: bool = False
    signal_lead_s: int | None = None
    """Seconds before the time limit at which the run is told. None: from the expected save time."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Any other sbatch option, by its long name without dashes; an empty value is a bare flag."""

    def __post_init__(self) -> None:
        _at_least("resources.nodes", self.nodes, 1)
        _at_least("resources.ranks_per_node", self.ranks_per_node, 1)
        if self.gpus_per_node is not None:
            _at_least("resources.gpus_per_node", self.gpus_per_node, 0)
        if self.cpus_per_task is not None:
            _at_least("resources.cpus_per_task", self.cpus_per_task, 1)
        if self.time is not None and parse_time(self.time) == 0:
            raise ConfigError("resources.time is 0: give a time limit such as 12:00:00")


@dataclass(frozen=True)
class ClusterConfig:
    """What a site needs, from configs/cluster/<name>.yaml. What it leaves out is probed."""

    name: str = "default"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = None
    gpu_type: str | None = None
    """For the estimate and MFU, for example a100-80gb. None: asked of the GPU itself."""
    cpus_per_task: int | None = None
    mem: str | None = None
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
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _one_of("stage", self.stage, STAGES)


STAGES = ("pretrain",)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}: it must be at least {least}")


def _seed(name: str, value: int) -> None:
    if not 0 <= value < 2**63:
        raise ConfigError(f"{name} is {value}: it must lie between 0 and 2^63 - 1")


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value}: it must be a positive number")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}: it must be one of {', '.join(map(str, allowed))}")
