"""Compute the GPU memory that vLLM takes beside a trainer, and its minimum.

Read from vLLM 0.32, not measured on a GPU. It gets a share of the card. At its start it loads the weights,
tries a pass over the most tokens it may take at once, and samples for the most sequences
(v1/worker/gpu_worker.py, determine_available_memory); that memory stays reserved, and the cache gets the rest
of the share. If that does not hold one full-length sequence, vLLM refuses to start
(v1/core/kv_cache_utils.py, _check_enough_kv_cache_memory).
"""

import math
from dataclasses import dataclass

from r1hpc.base.errors import ConfigError
from r1hpc.base.units import GIB
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.memory.step import WEIGHT_BYTES
from r1hpc.plan.model.shape import ModelShape
from r1hpc.plan.topology.batch import Topology
from r1hpc.plan.topology.gpus import gpu_type_of
from r1hpc.plan.topology.parts import rows_together

_SHARE = "gpu_memory_utilization"
_CACHE = "kv_cache_memory_bytes"
DEFAULT_SHARE = 0.3
"""The share that r1hpc gives vLLM on a GPU, and the next on a CPU (train/rollout/vllm_engine.py)."""
_DEFAULT_CPU_CACHE = 2**30
_BATCH, _LARGE_BATCH = (8192, 256), (16384, 1024)
"""vLLM's default tokens and sequences at once: the second on cards of 70 GiB and more, except the A100
(engine/arg_utils.py, get_batch_defaults)."""
_LARGE_CARD_GIB = 70.0
_DRAWING_TENSORS = 4
"""Tensors as large as the logits, in fp32, during sampling: the logits, their log-probabilities, their
probabilities and the noise (v1/sample/ops/topk_topp_sampler.py, forward_native), beside the original logits.
"""
_WORKSPACES_GIB, _GRAPHS_GIB = 0.1, 0.4
"""Memory of kernels, and of CUDA graphs, which enforce_eager does without; assumed."""
_SCALE_BYTES = 4
"""Per key or value, in a cache with a separate scale for each (v1/attention/backends/triton_attn.py,
customize_spec)."""


@dataclass(frozen=True)
class VllmMemory:
    """GiB on one GPU; of a CPU rank, in host memory."""

    given_gib: float
    """Weights, working memory and cache, as given by rollout.vllm_options."""
    least_gib: float
    """With a cache for one full-length sequence: with less it does not start."""
    wanted_gib: float
    """With a cache for all sequences that a rank decodes together."""
    taken_gib: float
    """Memory that must be free at its start."""
    fixed_gib: float
    """Weights and working memory."""
    sleeps: bool
    """It holds nothing while the policy is updated."""


def vllm_memory(
    config: RunConfig, shape: ModelShape, topology: Topology, card_gib: float
) -> VllmMemory | None:
    """Return vLLM's memory on each rank, of GPUs of `card_gib`; None: another engine samples. Raise
    ConfigError if rollout.vllm_options has a non-number where vLLM needs a number."""
    if config.rollout.engine != "vllm":
        return None
    width = WEIGHT_BYTES[config.train.precision]
    # The full weights in the trainer's precision, adapters merged; a tied head is a separate tensor there
    # (train/rollout/weight_sync.py, served_config).
    is_tied = shape.num_parameters == shape.num_body_parameters
    head = shape.vocab_size * shape.hidden_size if is_tied else 0
    weights = (shape.num_parameters + head) * width / GIB
    sequence = _sequence_bytes(config, shape) / GIB
    given_cache = _whole(config, _CACHE)
    if not topology.num_gpus:
        held = weights + (given_cache or _DEFAULT_CPU_CACHE) / GIB
        return VllmMemory(held, weights + sequence, held, held, weights, sleeps=False)
    tokens, rows = vllm_batch(config, card_gib, num_sequences(config, topology.world_size))
    # The peak of its trial pass: in a layer, about what one keeps for a backward pass; or during sampling.
    drawing = rows * shape.vocab_size * (4 * _DRAWING_TENSORS + width)
    working = max(tokens * shape.saved_values * width, drawing)
    graphs = 0.0 if config.rollout.vllm_options.get("enforce_eager") else _GRAPHS_GIB
    fixed = weights + working / GIB + _WORKSPACES_GIB + graphs
    share = card_gib * _share(config)
    given = share if given_cache is None else fixed + given_cache / GIB
    least = fixed + sequence
    wanted = fixed + sequence * min(rows, rows_together(config, topology.world_size))
    sleeps = config.rollout.vllm_options.get("enable_sleep_mode") is not False
    return VllmMemory(given, least, wanted, max(given, least, share), fixed, sleeps)


def num_sequences(config: RunConfig, num_ranks: int) -> int | None:
    """Return the sequences at once that r1hpc sets for vLLM on a GPU: what a rank decodes together, if that
    is below vLLM's own number on any card, which sizes its working memory; None: vLLM's own number."""
    together = rows_together(config, num_ranks)
    if together >= min(_BATCH[1], _LARGE_BATCH[1]):
        return None
    return min(together, _whole(config, "max_num_batched_tokens") or together)  # one per sequence


def share_setting(config: RunConfig, memory: VllmMemory, *, room_gib: float, card_gib: float) -> str | None:
    """Return the setting with which vLLM starts in the `room_gib` left by the trainer; None if there is none.
    It makes the cache as large as wanted, if there is room."""
    if _whole(config, _CACHE) is not None:
        most = math.floor((min(room_gib, memory.wanted_gib) - memory.fixed_gib) * GIB)
        fits = memory.least_gib <= room_gib and card_gib * _share(config) <= room_gib
        return f"rollout.vllm_options.{_CACHE}={most}" if fits else None
    low, high = math.ceil(100 * memory.least_gib / card_gib), math.floor(100 * room_gib / card_gib)
    if low > high:
        return None
    percent = min(high, max(low, math.ceil(100 * memory.wanted_gib / card_gib)))
    return f"rollout.vllm_options.{_SHARE}={percent / 100:g}"


def _sequence_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Return keys and values of a full-length sequence, by kv_cache_dtype; forms of less than 8 bits take
    less than counted here."""
    dtype = str(config.rollout.vllm_options.get("kv_cache_dtype"))
    width = WEIGHT_BYTES[config.train.precision]
    if dtype in ("float16", "bfloat16"):
        width = 2
    elif dtype.startswith(("fp8", "int8")):
        width = 1
    key = shape.head_dim * width + (_SCALE_BYTES if dtype.endswith("_per_token_head") else 0)
    return 2 * shape.num_layers * shape.num_key_value_heads * key * _longest(config)


def _longest(config: RunConfig) -> int:
    return config.rollout.max_prompt_length + config.rollout.max_completion_length


def vllm_batch(config: RunConfig, card_gib: float, sequences: int | None = None) -> tuple[int, int]:
    """Return the (tokens, sequences) that vLLM takes at once by its own rules (engine/arg_utils.py,
    _set_default_max_num_seqs_and_batched_tokens_args); `sequences` is r1hpc's number, see num_sequences. An
    unknown card counts as an A100."""
    options = config.rollout.vllm_options
    is_a100 = "a100" in (gpu_type_of(config) or "a100").lower()
    tokens, rows = _LARGE_BATCH if card_gib >= _LARGE_CARD_GIB and not is_a100 else _BATCH
    if options.get("performance_mode") == "throughput":
        tokens, rows = 2 * tokens, 2 * rows
    if options.get("enable_chunked_prefill") is False:  # a prompt is read in one step
        tokens = max(tokens, _longest(config))
    given_tokens, given_rows = _whole(config, "max_num_batched_tokens"), _whole(config, "max_num_seqs")
    given_rows = given_rows or sequences
    tokens = given_tokens or min(tokens, (given_rows or rows) * _longest(config))
    return tokens, given_rows or min(rows, tokens)


def _share(config: RunConfig) -> float:
    given = config.rollout.vllm_options.get(_SHARE, DEFAULT_SHARE)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
        raise ConfigError(
            f"rollout.vllm_options.{_SHARE} is {given!r}: it is vLLM's share of the GPU, above 0 and at most "
            f"1, for example {DEFAULT_SHARE}"
        )
    return float(given)


def _whole(config: RunConfig, name: str) -> int | None:
    given = config.rollout.vllm_options.get(name)
    if given is not None and (type(given) is not int or given < 1):
        raise ConfigError(
            f"rollout.vllm_options.{name} is {given!r}: it must be a whole number, at least 1, such as "
            f"{2**30 if name == _CACHE else 1024}"
        )
    return given
