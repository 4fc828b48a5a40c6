"""Define RunConfig, all settings of a run, with model, data, train, checkpoint, monitor, notify and limits.

The other sections are in cluster.py, rl.py and sections.py. Units are in the names; `None` means "derived".
Ranges are declared beside the fields and checked on loading (ranges.py). `__post_init__` checks settings
against each other, `plan` checks what needs arithmetic (batch, memory). The YAML files in `configs/` and
`jobs/` use the same names.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.cluster import ClusterConfig, ResourcesConfig
from r1hpc.config.schema.ranges import ranged
from r1hpc.config.schema.rl import (
    EvaluateConfig,
    GenerateConfig,
    RewardConfig,
    RlConfig,
    RolloutConfig,
    TaskConfig,
    WorkersConfig,
)
from r1hpc.config.schema.sections import DeepspeedConfig, MixConfig, ScriptConfig, ServeConfig

OWN_ATTENTIONS = ("gate", "gate_norm", "sigmoid_bias")
"""From train/model/attention.py: weights trained with one give wrong results with any other."""
SDPA = ("sdpa", "softmax")
"""torch's own attention, under either name."""
ATTENTIONS = (
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"),
    *("softmax", *OWN_ATTENTIONS),
)
"""transformers' own (modeling_utils.AttentionInterface), then ours."""
TRACKERS = ("tensorboard", "wandb", "prometheus")


class Precision(StrEnum):
    """Arithmetic of forward and backward. Master weights and moments stay fp32 in each."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    fp8 = "fp8"


@dataclass(frozen=True)
class ModelConfig:
    """Any Hugging Face causal LM: from a local folder, or from scratch by its config."""

    path: str | None = None
    """Local folder with config.json and weights (safetensors), which are loaded unless `from_scratch`; a
    folder without weights is refused."""
    config: dict[str, Any] = field(default_factory=dict)
    """A config.json written here (needs `model_type`), or changes to the one in `path`. The default
    `vocab_size` is the dataset's."""
    from_scratch: bool = False
    """Random weights, with the architecture of `path` or `config`."""
    tokenizer: str | None = None
    """A tokenizer.json or its folder; `characters`: the small built-in vocabulary of the arithmetic tasks.
    None: the one in `path`. Pretraining needs none, its shards hold ids."""
    chat_template: str = "auto"
    """Format of prompts. auto: the tokenizer's chat template if it has one; none: unchanged; else a Jinja
    file. Without a template a prompt follows the token that begins a text, if the tokenizer has one."""
    system_prompt: str | None = None
    """The system message before each prompt. None: the template's default."""
    open_thinking: bool = False
    """End every prompt with `<think>`, so that every completion begins with thinking. A chat template that
    already ends so needs no setting."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more arithmetic."""
    attn_implementation: str = ranged("sdpa", choices=ATTENTIONS)
    """transformers' name: eager, sdpa, flash_attention_2; or gate, gate_norm, sigmoid_bias, the article's
    dynamic attention gate and its relatives (train/model/attention.py). softmax is sdpa."""
    lora_rank: int = ranged(0, least=0)
    """0: all weights are trained. Else adapters of this rank, with peft."""
    lora_alpha: float = ranged(16.0, above=0)
    """Scales the adapters by lora_alpha / lora_rank."""
    lora_targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get adapters; empty: all linear layers but the head."""
    base_quantization: str = ranged("none", choices=("none", "nf4"))
    """nf4: keep the weights under the adapters in 4 bits (QLoRA, with bitsandbytes), except the head and the
    embeddings; checkpoints hold only the adapters."""

    def __post_init__(self) -> None:
        if self.path is None and self.config and "model_type" not in self.config:
            raise ConfigError(
                "model.config needs model_type (for example qwen2), or give model.path; "
                "to change a preset's, write config: !merge {...}"
            )
        if self.base_quantization == "none":
            return
        quantized = f"model.base_quantization={self.base_quantization}"
        if not self.lora_rank:
            raise ConfigError(
                f"{quantized} freezes the weights, and model.lora_rank is 0: give the rank of the adapters "
                "that are trained on them, for example 16"
            )
        if self.path is None or self.from_scratch:
            raise ConfigError(
                f"{quantized} rounds the weights of a trained model: give model.path, without "
                "model.from_scratch"
            )


@dataclass(frozen=True)
class DataConfig:
    """A dataset made by `r1hpc shard build`, or the recipe to build it on first use."""

    path: str | None = None
    """Folder of the dataset. None: it is built from `traces`, else from `recipe`, beside the runs."""
    recipe: str | None = "smoke"
    """Name in shards/ or a file; used only without `path` and `traces`."""
    traces: list[str] = field(default_factory=list)
    """Stage sft: JSONL files of {"prompt", "completion"}, or folders of them; built into shards with roles on
    first use. Not together with `path`."""
    seq_len: int = ranged(256, least=2)
    """Tokens of a sample; a longer trace is refused."""
    packing: bool = False
    """Stage sft: several documents in one row of at most `seq_len` tokens, each with its own positions and
    attention. A step trains on the same documents with the same loss, with less padding."""
    validation_documents: int = ranged(0, least=0)
    """Stage sft: hold out this many documents, in proportion to the sources, and all completions of their
    prompts; their loss is reported every `train.validate_every` steps."""
    seed: int = ranged(0, least=0)
    """Seed of the sample order; independent of train.seed."""
    verify: str = ranged("once", choices=("once", "every"))
    """`once`: check each chunk's checksum on first read; `every`: on every read."""
    mix: MixConfig = MixConfig()

    def __post_init__(self) -> None:
        if self.path is None and self.recipe is None and not self.traces:
            raise ConfigError("give data.path=DIR (made by `r1hpc shard build`) or data.recipe=NAME")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. global_batch_size never changes with the number of nodes; accumulation does."""

    num_steps: int = ranged(100, least=1)
    """Optimizer steps of the whole run, over all attempts."""
    global_batch_size: int = ranged(32, least=1)
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = ranged(4, least=1)
    """Sequences per rank and forward pass."""
    gradient_accumulation_steps: int | None = ranged(None, least=1)
    """Derived from the batch and the world size; a given value must agree."""
    lr: float = ranged(3e-4, above=0, most=100)
    """Peak learning rate, reached after warmup_steps."""
    min_lr_fraction: float = ranged(0.1, least=0, most=1)
    """The cosine schedule ends at lr x this."""
    warmup_steps: int = ranged(10, least=0)
    """A run shorter than this ends during warm-up."""
    weight_decay: float = ranged(0.1, least=0)
    """AdamW's, on every parameter."""
    beta1: float = ranged(0.9, least=0, below=1)
    """Adam's decay of the first moment."""
    beta2: float = ranged(0.95, least=0, below=1)
    """Adam's decay of the second moment."""
    eps: float = ranged(1e-8, above=0)
    """Adam's, in the denominator."""
    max_grad_norm: float = ranged(1.0, above=0)
    """Gradients are clipped to this global norm."""
    stop_grad_norm: float = ranged(1e4, above=0)
    """A larger gradient norm (before clipping), or one that is not finite, ends the run."""
    max_skipped_steps: int = ranged(20, least=1)
    """fp16: this many overflows in a row end the run, because the loss scale found no floor."""
    precision: Precision = Precision.bf16
    """Arithmetic of forward and backward; master weights and moments stay fp32. fp8: the matrix products of
    the layers, the rest is bf16; stages pretrain and sft, on Ada, Hopper and later cards."""
    fp8_recipe: str = ranged("rowwise", choices=("rowwise", "tensorwise"))
    """One scale for each row of a matrix, or one for the full matrix: coarser, and faster on some cards."""
    fp8_emulate: bool = False
    """The same rounding on hardware without FP8, slower than bf16: shows the effect on a loss."""
    gradient_compression: str = ranged("none", choices=("none", "int8", "powersgd"))
    """Averaging of gradients over slow links; needs deepspeed.zero_stage=0. int8: in blocks of 8-bit
    integers; powersgd: matrices by two of `compression_rank` columns. The error of a step is added to the
    next."""
    compression_rank: int = ranged(4, least=1)
    """PowerSGD: more columns, more bytes, less error carried to the next step."""
    validate_every: int = ranged(50, least=1)
    """Steps between two losses on `data.validation_documents`."""
    early_stopping: int = ranged(0, least=0)
    """Stage sft: finish after this many validations in a row without a new lowest loss, and keep the model
    with the lowest. 0: train to the last step, and keep that model."""
    logits_chunk_tokens: int | None = ranged(None, least=0)
    """Tokens per rank whose logits are held at once; above that, the output head works in chunks and
    recomputes each in the backward pass. None: as many as take 256 MiB in fp32; 0: all."""
    sequence_parallel: int = ranged(1, least=1)
    """Stages pretrain and sft: this many ranks of a node share every sequence, each with a part of its tokens
    and of the attention's heads (Ulysses), and the same part of activations and logits. Must divide the ranks
    of a node, the heads and data.seq_len; the batch counts groups of ranks."""
    seed: int = ranged(0, least=0)
    """Seed of weights and dropout. Every rank derives its own stream from it."""
    deterministic: bool = False
    """On GPUs: use kernels with a fixed order of addition, so that two runs are equal to the bit. Slower. An
    operation without such a kernel warns in its rank's log, and results may then differ; in a backward pass
    it ends the run. When false, samples and rates are the same but losses may differ in their last digits,
    also after a resume."""
    hang_timeout_s: float = ranged(1800.0, above=0)
    """Without progress for this long, stacks are dumped, the attempt ends and is requeued. Loading libraries
    may take five minutes more."""
    print_every: int = ranged(10, least=1)
    """Steps between two lines in the log of rank 0."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Schedule of saves, and the number kept."""

    save_every: int = ranged(500, least=1)
    """Steps between periodic saves: the most work a crash can cost, plus as much again during a save."""
    keep: int = ranged(2, least=2)
    """Verified checkpoints kept: at least 2, since the last may be bad."""
    asynchronous: bool = True
    """Training waits only for a copy to host memory and continues during the write. If false, or if the host
    lacks memory for the copy, training waits for the file system."""
    assumed_bandwidth_gib_s: float | None = ranged(None, above=0)
    """File system bandwidth per run, for the planned save time. Default: measured from earlier saves in the
    same run root, else 1."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, if `monitor.trackers` names it. The key is the one in ~/.netrc (`wandb login`)."""

    mode: str = ranged("offline", choices=("offline", "online"))
    """offline: a folder in the run folder, for `wandb sync` from a machine with network. online: live, from
    nodes that reach the server."""
    project: str = "r1hpc"
    """The project for the run."""
    entity: str | None = None
    """The team or user. None: the default of the key's owner."""

    def __post_init__(self) -> None:
        if not 0 < len(self.project) <= 128 or set(self.project) & set("/\\#?%:"):
            raise ConfigError(
                f"monitor.wandb.project is {self.project[:140]!r}: W&B takes 1 to 128 characters, "
                "none of / \\ # ? % :"
            )


@dataclass(frozen=True)
class MonitorConfig:
    """Monitoring during a run: NVML on every node, and trackers fed from its metrics."""

    enabled: bool = True
    """False: GPUs are not read."""
    period_s: float = ranged(5.0, least=0.5)
    """At least 0.5: NVML renews its power reading about twice a second. Eight GPUs write 4 kB per sample."""
    trackers: list[str] = ranged(factory=list, choices=TRACKERS)
    """tensorboard, wandb, prometheus: a separate process on the first node sends them the run's records live,
    without delaying training. Stages pretrain, sft and rl."""
    samples: bool = True
    """False: prompts and completions of stage rl stay in the run folder; W&B and TensorBoard get none."""
    wandb: WandbConfig = WandbConfig()
    prometheus_dir: str | None = None
    """The folder of node_exporter's textfile collector on the node. None: the run folder."""


@dataclass(frozen=True)
class NotifyConfig:
    """A message when the run is over: finished, stopped, cancelled or failed for good."""

    url: str | None = None
    """Gets a POST of {"text", "run", "state", "detail", "run_dir"} as JSON, as Slack and Mattermost take it.
    The first node must reach it."""
    command: str | None = None
    """A shell command on the first node; the message is its input: `mail -s r1hpc me@example.org`."""

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("https://", "http://")):
            raise ConfigError("notify.url must begin with https:// or http://")


@dataclass(frozen=True)
class LimitsConfig:
    """Attempts that may end by each cause before the run stops for good. -1: no limit.

    Counted since the last new checkpoint: old failures do not end a run that makes progress.
    """

    max_preemptions: int = ranged(-1, least=-1)
    """Attempts that Slurm ended for another job."""
    max_timeouts: int = ranged(-1, least=-1)
    """Attempts that reached the time limit."""
    max_node_failures: int = ranged(5, least=-1)
    """Attempts that lost a node."""
    max_crashes: int = ranged(1, least=-1)
    """Attempts that failed by themselves."""
    max_ooms: int = ranged(0, least=-1)
    """Attempts that ran out of GPU or host memory."""
    max_hangs: int = ranged(3, least=-1)
    """Attempts without progress for train.hang_timeout_s."""
    max_attempts_without_checkpoint: int = ranged(3, least=1)
    """Attempts in a row without a new checkpoint; then the run stops, whatever the cause. Attempts that were
    preempted or lost a node before their first step do not count."""
    max_gpu_hours: float | None = ranged(None, above=0)
    """GPU-hours of all attempts together; at this limit the run saves and stops for good."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run."""

    stage: str = "pretrain"
    """pretrain; traces: demonstrations of a task; sft: on completions; rl: GRPO or PPO; rollout:
    samples for a run of stage rl (section workers); generate: the model's
    own completions, filtered (rejection sampling); evaluate; serve: answers over HTTP, by `r1hpc serve`;
    script: your own."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    task: TaskConfig = TaskConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    rl: RlConfig = RlConfig()
    workers: WorkersConfig = WorkersConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    serve: ServeConfig = ServeConfig()
    script: ScriptConfig = ScriptConfig()
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of a stage from another package (entry point r1hpc.workloads), which checks them."""
    deepspeed: DeepspeedConfig = DeepspeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    notify: NotifyConfig = NotifyConfig()
    limits: LimitsConfig = LimitsConfig()
    resources: ResourcesConfig = ResourcesConfig()
    cluster: ClusterConfig = ClusterConfig()

    def __post_init__(self) -> None:
        if self.stage == "pretrain" and self.model.lora_rank:
            raise ConfigError(
                "model.lora_rank has no use in stage pretrain, which trains all weights: remove it"
            )
        if self.model.base_quantization != "none" and self.stage not in ("sft", "rl"):
            raise ConfigError(
                f"model.base_quantization={self.model.base_quantization} is of stages sft and rl, which "
                f"train adapters, and has no use in stage {self.stage}: remove it"
            )
        for key in ("packing", "validation_documents"):
            if getattr(self.data, key) and self.stage != "sft":
                raise ConfigError(
                    f"data.{key} is of stage sft and has no use in stage {self.stage}: remove it"
                )
        if self.stage not in ("pretrain", "sft") and self.data.mix.is_used:
            raise ConfigError(
                f"data.mix is of stages pretrain and sft and has no use in stage {self.stage}: remove it"
            )
        if self.train.early_stopping and not self.data.validation_documents:
            raise ConfigError(
                "train.early_stopping needs documents to validate on: set data.validation_documents"
            )
        if self.generate.min_pass_rate > self.generate.max_pass_rate:
            raise ConfigError(
                f"generate.min_pass_rate={self.generate.min_pass_rate:g} is above generate.max_pass_rate="
                f"{self.generate.max_pass_rate:g}, and nothing would be kept: lower it"
            )
        if self.stage == "rl":
            self._check_rl()
        if self.stage == "serve":
            self._check_serve()

    def _check_serve(self) -> None:
        if self.model.from_scratch or self.model.lora_rank:
            raise ConfigError(
                "stage serve answers with the weights in model.path as they are: model.from_scratch and "
                "model.lora_rank have no use in it"
            )
        if self.resources.nodes != 1 or self.resources.ranks_per_node != 1:
            raise ConfigError(
                "stage serve has one server on one node: leave resources.nodes and ranks_per_node at 1"
            )

    def _check_rl(self) -> None:
        num = self.rollout.num_generations
        if num < 2 and (self.rl.algorithm == "grpo" or self.rl.max_resamples):
            raise ConfigError(
                f"rollout.num_generations is {num}: GRPO compares the completions of a prompt with each "
                "other, and needs 2 at least"
            )
        if self.rl.algorithm == "distill" and self.rl.teacher is None:
            raise ConfigError(
                "rl.algorithm=distill needs rl.teacher=DIR, the model whose distribution is learnt"
            )
        if self.rl.algorithm == "ppo" and self.model.lora_rank:
            raise ConfigError(
                "rl.algorithm=ppo trains a critic with all its weights, which model.lora_rank is to avoid: "
                "take rl.algorithm=grpo, or model.lora_rank=0"
            )
        if self.rl.objective == "cispo" and self.rl.dual_clip is not None:
            raise ConfigError(
                "rl.dual_clip has no use with rl.objective=cispo, which clips no gain: remove it"
            )
        if (self.rollout.top_p, self.rollout.top_k, self.rollout.min_p) != (1.0, 0, 0.0):
            raise ConfigError(
                "rollout.top_p, top_k and min_p have no use in stage rl: its loss needs the "
                "log-probabilities of the whole distribution; for its evaluations set evaluate.top_p ..."
            )
        if self.train.gradient_accumulation_steps is not None:
            raise ConfigError(
                "train.gradient_accumulation_steps has no use in stage rl, where it follows from what a "
                "rollout leaves to train on: remove it, and set train.micro_batch_size"
            )


def section_of(setting: "Field[Any]") -> type | None:
    """Return the dataclass of a field that is a section; None if it is a setting."""
    return type(setting.default) if is_dataclass(setting.default) else None


def settings_of(schema: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, "Field[Any]"]]:
    """Yield (dotted key, field) of every setting, in order."""
    for each in fields(schema):
        section = section_of(each)
        if section is None:
            yield f"{prefix}{each.name}", each
        else:
            yield from settings_of(section, f"{prefix}{each.name}.")
