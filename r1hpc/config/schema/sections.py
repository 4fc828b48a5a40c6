"""Define the settings of DeepSpeed, of changing data mixtures (data.mix), of servers and of scripts."""

import ipaddress
import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.ranges import leaves, ranged

_ZERO_NUMBERS = (
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "sub_group_size",
    "zero_hpz_partition_size",
)
"""Keys of zero_optimization used to plan memory."""
_OWN_OF_DEEPSPEED = {
    "zero_optimization.stage": "deepspeed.zero_stage",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "sequence_parallel_size": "train.sequence_parallel",
    "checkpoint.load_universal": "the number of ranks that a checkpoint is of",
}
"""Keys of DeepSpeed's config for placement, plan, loss and checkpoints, with their setting here."""
_OURS = {
    "--model": "model.path",
    "--served-model-name": "serve.model_name",
    "--host": "serve.host",
    "--port": "serve.port",
    "--dtype": "serve.dtype",
    "--max-model-len": "serve.max_model_len",
    "--tensor-parallel-size": "resources.gpus_per_node",
    "-tp": "resources.gpus_per_node",
}
"""vLLM's options that have a setting here."""
_CLOSED = (
    *("--api-key", "--middleware", "--root-path", "--uds", "--config", "--api-server-count", "--headless"),
    *("--ssl-keyfile", "--ssl-certfile", "--data-parallel-external-lb", "--data-parallel-hybrid-lb"),
    "--omni",
)
"""vLLM's options that would bypass the key, or make the server unreachable."""


def zero_converts(saved: object, asked: int) -> bool:
    """True if a checkpoint of one ZeRO stage can be resumed under another: DeepSpeed converts 1 and 2."""
    return saved == asked or {saved, asked} == {1, 2}


@dataclass(frozen=True)
class DeepspeedConfig:
    """Settings of DeepSpeed. The batch sizes, precision and schedule come from `train`."""

    zero_stage: int = ranged(1, choices=(0, 1, 2, 3))
    """0: nothing is sharded over ranks; 1: optimizer states; 2: and gradients; 3: and weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Merged into DeepSpeed's config, under DeepSpeed's names; wins over r1hpc's values. Keys that have a
    setting here are refused."""

    def check_new(self) -> None:
        """Refuse keys of `extra` that have a setting here; older runs that have some may continue."""
        for path, ours in _OWN_OF_DEEPSPEED.items():
            value: Any = self.extra
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                raise ConfigError(f"deepspeed.extra: {path} is set by {ours}: leave it out of extra")
        for key, value in leaves(self.extra, "deepspeed.extra"):
            if value == "auto":
                raise ConfigError(f"{key} is auto, which Hugging Face's Trainer fills in: write its value")
        options = self.extra.get("zero_optimization", {})
        if not isinstance(options, dict):
            raise ConfigError("deepspeed.extra: zero_optimization is a section: give its keys and values")
        for name in _ZERO_NUMBERS:
            if isinstance(options.get(name, 0), bool) or not isinstance(options.get(name, 0), int | float):
                raise ConfigError(f"deepspeed.extra: zero_optimization.{name} must be a number")


@dataclass(frozen=True)
class MixConfig:
    """Weights of the dataset's sources that change during a run. Before that the recipe's weights apply, or
    the sources' sizes. A source with weight 0 is not used."""

    schedule: list[dict[str, Any]] = field(default_factory=list)
    """[{from_step: N, weights: {SOURCE: WEIGHT, …}}, …]: from optimizer step N on. Steps are counted from 1;
    from_step 1 replaces the recipe's weights. `submit --resume` may change entries that have not begun."""

    def __post_init__(self) -> None:
        last = 0
        for number, entry in enumerate(self.schedule):
            last = _check_change(f"data.mix.schedule[{number}]", entry, after=last)

    @property
    def is_used(self) -> bool:
        return bool(self.schedule)


def _check_change(key: str, entry: dict[str, Any], *, after: int) -> int:
    """Return the first step of a schedule's entry, which must come after the entry before."""
    for name in entry:
        if name not in ("from_step", "weights"):
            form = "{from_step: N, weights: {SOURCE: WEIGHT}}"
            raise ConfigError(f"{key} has no key {name!r}: it is {form}")
    step, weights = entry.get("from_step"), entry.get("weights")
    if isinstance(step, bool) or not isinstance(step, int) or step <= after:
        raise ConfigError(f"{key}.from_step is {step!r}: it must be a whole number above {after}")
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"{key}.weights is {weights!r}: give each source its weight, {{SOURCE: WEIGHT}}")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise ConfigError(f"{key}.weights has the key {name!r}: the name of a source is text, '{name}'")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigError(f"{key}.weights.{name} is {weight!r}: it must be a number, at least 0")
    if not any(weights.values()):
        raise ConfigError(f"{key}.weights are all 0: give one source some weight")
    return step


@dataclass(frozen=True)
class ServeConfig:
    """vLLM's OpenAI server on its own node: `python -m r1hpc.serve RUN|FOLDER` (docs/serving.md)."""

    idle_minutes: float = ranged(30.0, least=0)
    """The server ends after this many minutes without a request. 0: only at its time limit."""
    start_minutes: float = ranged(30.0, above=0)
    """Minutes for loading and compiling; a server that does not answer by then has failed."""
    model_name: str | None = None
    """The model name for clients. None: the name of the run or folder."""
    host: str | None = None
    """The address it listens on. None: the node's address on the route to the submitting host; on this
    machine 127.0.0.1. All of a node's addresses at once are refused."""
    port: int | None = ranged(None, least=1024, most=65535)
    """None: a free one."""
    dtype: str = ranged("auto", choices=("auto", "bfloat16", "float16", "float32"))
    """Data type of weights and arithmetic. auto: the folder's; vLLM uses 16 bits for one in fp32."""
    max_model_len: int | None = ranged(None, least=1)
    """Tokens of a prompt and its completion. None: the model's maximum."""
    python: str | None = None
    """The interpreter that has vLLM, or a command that starts one. None: the job's."""
    options: list[str] = field(default_factory=list)
    """More options for vLLM's server, such as --max-num-seqs=64."""

    def __post_init__(self) -> None:
        if self.host is not None and not self.host.isprintable():
            raise ConfigError(f"serve.host={self.host!r} is no name or address of a node")
        if self.host is not None and _is_every_address(self.host.strip("[]")):
            raise ConfigError(
                f"serve.host={self.host!r} is every address of a node, and others are on its networks too: "
                "name one, or leave it out for the node's own"
            )
        for word in self.options:
            _check_option(word.partition("=")[0].replace("_", "-"))


def _is_every_address(host: str) -> bool:
    """True for 0.0.0.0 and ::, in any spelling that a socket accepts."""
    if host in ("", "*"):
        return True
    import socket  # deferred: --help must be quick

    with suppress(OSError):
        return not any(socket.inet_aton(host))  # 0, 0x0, 0.0
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_unspecified
    return False


def _check_option(name: str) -> None:
    """Check an option; like argparse, vLLM accepts an abbreviation."""
    for ours, setting in _OURS.items():
        if ours.startswith(name) and name.startswith("-t" if ours == "-tp" else "--"):
            raise ConfigError(f"serve.options holds {name}: set {setting} in its place")
    for closed in _CLOSED:
        if name.startswith("--") and closed.startswith(name):
            raise ConfigError(
                f"serve.options holds {name}: by {closed} the server would be reached past its key, or not "
                "at all; leave it out"
            )


@dataclass(frozen=True)
class ScriptConfig:
    """Anybody's own training script, one process per rank: `python -m r1hpc.submit train.py -- ARGS`."""

    path: str | None = None
    """The script, or a program. It is run where it lies; a change counts from the next attempt on."""
    module: str | None = None
    """Its name as a module, `pkg.train`: run as `python -m pkg.train`. `submit -m pkg.train` sets it."""
    distributed: bool = False
    """Give RANK, WORLD_SIZE and MASTER_ADDR to a single rank too, as torchrun does."""
    args: list[str] = field(default_factory=list)
    """Its arguments. {run} is the run folder, {checkpoint} the newest complete checkpoint, {steps}
    script.steps, {save_every} checkpoint.save_every; {rank}, {local_rank}, {world_size}: of this process.
    Before the first checkpoint a word with {checkpoint} is left out, together with the flag before a bare one
    (--resume {checkpoint})."""
    resume_args: list[str] = field(default_factory=list)
    """More arguments once there is a checkpoint, such as [--init_from=resume]. A script that uses
    r1hpc.client, transformers' Trainer or Lightning finds its checkpoint without."""
    python: str | None = None
    """The interpreter, or words before the script, such as `uv run`. None: the one of the ranks for a .py."""
    cwd: str | None = None
    """The folder it is started in. None: the one it was submitted from."""
    env: dict[str, str] = field(default_factory=dict)
    """More variables of its environment. No passwords: the run records them."""
    steps: int | None = ranged(None, least=1)
    """Optimizer steps of the whole run, for progress, time left and the estimate. None: unknown."""
    checkpoints: str | None = None
    """Pattern of the checkpoints that it writes by itself, such as `out/checkpoint-*`, below script.cwd."""
    stop_signal: str = ranged("TERM", choices=("TERM", "INT", "USR1", "USR2"))
    """The signal that asks it to save and leave, unless it uses r1hpc.client or a hook."""
