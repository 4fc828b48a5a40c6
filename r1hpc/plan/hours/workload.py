"""Hold the numbers of a training run that estimate.py needs: parameters, tokens, GPU, parallelism.

The workloads that r1hpc runs (attempt/workload.py) are something else. None means unknown: the estimate then
gets wider instead of guessing silently.

FLOPs per token are 6 for each weight that a token meets and 12 x layers x hidden x seq_len for attention: the
full square of scores, PaLM's convention (arXiv 2204.02311, appendix B). The causal convention halves the
second term. A bare number of parameters counts all of them as weights (tables included); layers x hidden then
follows from the size.
"""

import math
from dataclasses import dataclass
from typing import Any

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest
from r1hpc.plan.model.shape import ModelShape, flops_per_token, hardware_flops_per_token
from r1hpc.plan.topology.gpus import Gpu

PRECISIONS = ("bf16", "fp16", "fp8", "fp4", "tf32", "fp32")
STACKS = ("deepspeed", "torch", "megatron")
"""Training software: DeepSpeed; PyTorch's own (FSDP, torchtitan); Megatron-LM with Transformer Engine."""
RECOMPUTATION = ("none", "selective", "full")
ASSUMED_GPU = "A100-SXM4-80GB"
"""Used if no card is given; also the article's."""
_LAYERS_TIMES_HIDDEN_OF_7B = 32 * 4096
_PARAMETERS_OF_7B = 6.74e9
_HEAD = 128
"""Hidden size per layer, roughly, over all published GPT and Llama shapes: 96 to 160."""
_LARGEST_PARAMS = 1e14
_LARGEST_TOKENS = 1e17


@dataclass(frozen=True)
class Workload:
    """One training run. Counts are of the full model and run; tokens_per_step is the global batch."""

    params: float
    """All parameters."""
    active_params: float
    """Parameters that one token meets; equal to params except for a mixture of experts."""
    tokens: float
    seq_len: int
    gpu: Gpu
    flops_per_token: float
    attention_share: float
    """Attention scores' part of the FLOPs, 0..1."""
    hidden_size: float
    layers: float
    shape_is_known: bool
    recomputed_flops_per_token: float
    """The FLOPs added by full recomputation."""
    num_gpus: int | None = None
    tokens_per_step: float | None = None
    micro_batch_size: float | None = None
    precision: str = "bf16"
    recompute: str | None = None
    zero_stage: int | None = None
    offload: bool = False
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    stack: str | None = None

    def __post_init__(self) -> None:
        check_amount("--params", self.params, _LARGEST_PARAMS)
        check_amount("--active-params", self.active_params, self.params, "--params")
        check_amount("--tokens", self.tokens, _LARGEST_TOKENS)
        check_whole("--seq-len", self.seq_len, 1 << 24)
        check_whole("--num-gpus", self.num_gpus, 10**6)
        check_amount("--global-batch-tokens", self.tokens_per_step, _LARGEST_TOKENS)
        check_amount("--micro-batch-size", self.micro_batch_size, 1 << 20)
        check_whole("--tensor-parallel", self.tensor_parallel, 4096)
        check_whole("--pipeline-parallel", self.pipeline_parallel, 4096)
        check_choice("--recompute", self.recompute, RECOMPUTATION)
        check_choice("--stack", self.stack, STACKS)
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise UsageError(f"--zero-stage is {self.zero_stage}: it must be 0, 1, 2 or 3")
        check_precision(self.precision, self.gpu)
        ways = self.model_parallel
        if ways is not None and self.num_gpus is not None and self.num_gpus % ways:
            raise UsageError(f"--num-gpus {self.num_gpus} is not a multiple of tensor x pipeline = {ways}")

    @property
    def is_moe(self) -> bool:
        return self.active_params < 0.95 * self.params

    @property
    def model_parallel(self) -> int | None:
        """Return the GPUs that hold one copy of the model, if either kind is given."""
        if self.tensor_parallel is None and self.pipeline_parallel is None:
            return None
        return (self.tensor_parallel or 1) * (self.pipeline_parallel or 1)

    @property
    def flops(self) -> float:
        """Return the model FLOPs of the run, with the full square of attention."""
        return self.tokens * self.flops_per_token

    @property
    def flops_causal(self) -> float:
        return self.flops * (1 - self.attention_share / 2)

    @property
    def hardware_flops(self) -> float:
        """Return FLOPs with the second forward pass of full recomputation; unknown counts as none."""
        again = self.recomputed_flops_per_token if self.recompute == "full" else 0.0
        return self.tokens * (self.flops_per_token + again)

    def gpu_hours_at(self, mfu: float) -> float:
        return self.flops / (self.gpu.peak_flops * mfu) / 3600

    @staticmethod
    def of_counts(
        *,
        params: float,
        tokens: float,
        gpu: Gpu,
        active_params: float | None = None,
        seq_len: int = 2048,
        layers: int | None = None,
        hidden_size: int | None = None,
        **known: Any,
    ) -> "Workload":
        """Make it from numbers. `layers` and `hidden_size` make the attention term exact.

        Raise UsageError for a number that no run can have.
        """
        check_amount("--params", params, _LARGEST_PARAMS)
        check_amount("--active-params", active_params, params, "--params")
        check_whole("--layers", layers, 10**5)
        check_whole("--hidden-size", hidden_size, 10**7)
        active = active_params or params
        wide, deep = _guess_shape(active, layers, hidden_size)
        attention = 12 * wide * deep * seq_len
        per_token = 6 * active + attention
        return Workload(
            params=params,
            active_params=active,
            tokens=tokens,
            seq_len=seq_len,
            gpu=gpu,
            flops_per_token=per_token,
            attention_share=attention / per_token,
            hidden_size=wide,
            layers=deep,
            shape_is_known=layers is not None and hidden_size is not None,
            recomputed_flops_per_token=per_token / 3,  # no bare count has a head that is not repeated
            **known,
        )

    @staticmethod
    def of_shape(shape: ModelShape, *, tokens: float, seq_len: int, gpu: Gpu, **known: Any) -> "Workload":
        per_token = flops_per_token(shape, seq_len)
        return Workload(
            params=shape.num_parameters,
            active_params=shape.num_active_parameters,
            tokens=tokens,
            seq_len=seq_len,
            gpu=gpu,
            flops_per_token=per_token,
            attention_share=1 - 6 * shape.num_matmul_parameters / per_token,
            hidden_size=shape.hidden_size,
            layers=shape.num_layers,
            shape_is_known=True,
            recomputed_flops_per_token=hardware_flops_per_token(shape, seq_len, True) - per_token,
            **known,
        )


def guessed_cache_bytes(params: float) -> float:
    """Return a token's keys and values in 16 bits, without grouped queries, for a guessed shape."""
    check_amount("--params", params, _LARGEST_PARAMS)
    hidden, layers = _guess_shape(params, None, None)
    return 2 * 2 * layers * hidden


def _guess_shape(params: float, layers: int | None, hidden: int | None) -> tuple[float, float]:
    """Return (hidden, layers). Params grow with layers x hidden^2, so layers x hidden with params^(2/3)."""
    area = _LAYERS_TIMES_HIDDEN_OF_7B * (params / _PARAMETERS_OF_7B) ** (2 / 3)
    if hidden is not None:
        return hidden, layers if layers is not None else max(1.0, area / hidden)
    if layers is not None:
        return max(1.0, area / layers), layers
    return math.sqrt(area * _HEAD), math.sqrt(area / _HEAD)


def parse_count(text: str, what: str) -> float:
    """Parse a count as people write it.

    >>> parse_count("7B", "--params"), parse_count("1.5e9", "--params"), parse_count("300 M", "--params")
    (7000000000.0, 1500000000.0, 300000000.0)
    """
    units = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    plain = text.strip().replace(",", "").replace("_", "").upper()
    number, unit = (plain[:-1].strip(), plain[-1:]) if plain[-1:] in set("KMBGT") else (plain, "")
    try:
        value = float(number.encode("ascii")) * units[unit]  # float() reads the digits of any script
    except ValueError:
        raise UsageError(f"{what} {text!r} is not a number such as 7B, 350M or 1.5e9") from None
    if not math.isfinite(value):
        raise UsageError(f"{what} {text!r} is not a finite number")
    return value


def check_amount(flag: str, value: float | None, most: float, most_flag: str | None = None) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{flag} is {value:g}: it must be above 0, for example 7B or 1.5e9")
    if value > most:
        limit = (
            f"more than {most_flag}, {most:.4g}" if most_flag else f"above {most:.0e}, more than any run has"
        )
        raise UsageError(f"{flag} is {value:.4g}, {limit}; check the unit")


def check_whole(flag: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise UsageError(f"{flag} is {value}: it must be a whole number from 1 to {most}")


def check_precision(precision: str, gpu: Gpu) -> None:
    """Refuse a precision that is unknown, or that the card does not have."""
    check_choice("--precision", precision, PRECISIONS)
    if precision == "fp8" and not gpu.has_fp8:
        raise UsageError(
            f"{gpu.name} has no FP8 arithmetic (that begins with Ada and Hopper): take --precision "
            f"{'bf16' if gpu.has_bf16 else 'fp16'}"
        )
    if precision == "fp4" and not gpu.has_fp4:
        raise UsageError(f"{gpu.name} has no FP4 (that begins with Blackwell): take --precision bf16")
    if precision == "bf16" and not gpu.has_bf16:
        raise UsageError(f"{gpu.name} has no bf16: take --precision fp16")


def check_choice(flag: str, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise UsageError(f"{flag} is {value!r}{nearest(str(value), known)}: it must be {', '.join(known)}")
