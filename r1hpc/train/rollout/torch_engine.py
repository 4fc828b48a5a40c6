"""Sample completions with the training model; define the interface of sampling engines.

Each completion has its own random stream, keyed by (seed, item, number): which prompts it was decoded with,
on which rank, and what was interrupted before do not matter. `TorchSampler` decodes with the training model:
below ZeRO 3 in place, under ZeRO 3 in a replica whose weights are gathered once per rollout instead of once
per token (huggingface/trl#3858: the first step after an hour).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.tasks.text.format import SpecialIds
from r1hpc.train.model.attention import base_model
from r1hpc.train.parallel.distributed import Group, attend_at_any_length, portions

_GATHER_BYTES = 1 << 30
_ROWS_AT_ONCE = 64
"""Rows whose cumulative distribution is held in float64 at a time."""
_SUMMED = 1 << 24
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Cut:
    """Truncation of the distribution at the temperature. top_k keeps so many of the likeliest tokens, min_p
    of those the ones at least so many times as likely as the first, top_p of those the fewest that reach it.
    """

    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0


WHOLE = Cut()


@dataclass(frozen=True)
class Request:
    """Prompts to complete, `num_generations` times each."""

    prompts: Sequence[Sequence[int]]
    streams: npt.NDArray[np.uint64]
    """(num_prompts x num_generations,): see `streams`."""
    num_generations: int
    max_completion_length: int
    temperature: float
    """0: greedy."""
    cut: Cut = WHOLE


@dataclass(frozen=True)
class Samples:
    """Completions, side by side per prompt. n = num_prompts x num_generations."""

    tokens: npt.NDArray[np.int32]
    """(n, longest), padded with the pad id."""
    logprobs: npt.NDArray[np.float32]
    """(n, longest): of each token under the distribution it was drawn from (greedy: the policy's)."""
    lengths: npt.NDArray[np.int32]
    """(n,): tokens up to and with the end token."""
    ended: npt.NDArray[np.bool_]
    """(n,): False if max_completion_length cut it off."""


class RolloutEngine(Protocol):
    """Interface of an engine that samples completions from the policy."""

    def sync_weights(self, network: torch.nn.Module) -> str:
        """Take the weights of `network` as they are now, all ranks together; return an id of their bits."""

    def sample(self, request: Request, should_stop: Callable[[], bool]) -> Samples | None:
        """Return this rank's completions; None if `should_stop` returned True in between."""

    def release(self) -> None:
        """Free memory that only sampling needs."""

    def facts(self) -> dict[str, float]:
        """Return this rank's fields of train.jsonl about the last weight update."""


def logprob_limit(config: RunConfig) -> float:
    """Return rollout.max_logprob_difference, or else the limit for two programs on the same weights, in nats.

    Measured on a CPU, vLLM against transformers: fp32 9e-6 (SmolLM2-135M) and 2e-6 (a tiny Qwen2), where an
    output head that is one step of 1e-5 old makes 2e-4; bf16, SmolLM2 on its answers to sums, 0.010 to 0.016.
    """
    given = config.rollout.max_logprob_difference
    if given is not None:
        return given
    return 1e-4 if config.train.precision is Precision.fp32 else 0.05


def streams(seed: int, items: Sequence[int], num_generations: int) -> npt.NDArray[np.uint64]:
    """Return (len(items) x num_generations,) keys, from which the completions' random numbers follow.

    A counter-based generator (splitmix64), as in Salmon et al., SC 2011: the number for a token is a function
    of (seed, item, generation, position) alone. There is no state to save, to lose or to share.
    """
    with np.errstate(over="ignore"):
        base = _mix(_mix(np.uint64(seed) + _GOLDEN) ^ np.asarray(items, np.uint64))
        numbers = np.arange(1, num_generations + 1, dtype=np.uint64) * _GOLDEN
        keys: npt.NDArray[np.uint64] = _mix(base[:, None] ^ _mix(numbers)[None, :]).ravel()
    return keys


def uniforms(keys: npt.NDArray[np.uint64], position: int) -> npt.NDArray[np.float64]:
    """Return the number in [0, 1) that decides token `position` of each completion."""
    with np.errstate(over="ignore"):
        mixed: npt.NDArray[np.uint64] = _mix(keys + _GOLDEN * np.uint64(position + 1))
    # The upper 53 bits: as many as a float64 holds.
    numbers: npt.NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _mix(x: Any) -> Any:
    """Compute the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class TorchSampler:
    """Samples in batches with a KV cache over a Hugging Face causal language model."""

    def __init__(
        self,
        group: Group,
        ids: SpecialIds,
        *,
        zero_stage: int,
        replica: Callable[[], torch.nn.Module],
        poll_every: int = 16,
    ) -> None:
        """`replica` builds the architecture anew; it is called once, only under ZeRO 3."""
        self._group = group
        self._ids = ids
        self._zero_stage = zero_stage
        self._build_replica = replica
        self._replica: torch.nn.Module | None = None
        self._network: Any = None
        self._cache_argument = ""
        self._poll_every = poll_every
        attend_at_any_length()

    def sync_weights(self, network: torch.nn.Module) -> str:
        if not self._cache_argument:
            bare = base_model(network)
            if getattr(bare, "_is_stateful", False):  # transformers' mark of state-space and linear attention
                raise ConfigError(
                    f"a model of type {bare.config.model_type} keeps a state other than a cache of keys and "
                    "values: rollout.engine=sampler cannot decode it, rollout.engine=vllm may"
                )
            self._cache_argument = cache_argument(network)
        self._network = self._gather(network) if self._zero_stage == 3 else network
        return fingerprint(self._network)

    def facts(self) -> dict[str, float]:
        return {}

    def release(self) -> None:
        """Free the replica under ZeRO 3, which takes a whole model's memory."""
        self._network = None
        if self._replica is not None:
            for tensor in self._replica.parameters():
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    @torch.no_grad()
    def sample(self, request: Request, should_stop: Callable[[], bool]) -> Samples | None:
        training = self._network.training
        self._network.eval()  # no dropout; gradient checkpointing forbids the cache
        try:
            return self._decode(request, should_stop)
        finally:
            self._network.train(training)

    def _decode(self, request: Request, should_stop: Callable[[], bool]) -> Samples | None:
        device, num, longest = self._group.device, request.num_generations, max(map(len, request.prompts))
        # Prompts are padded on the left: the next token of every row is in the same column.
        ids = torch.full((len(request.prompts), longest), self._ids.pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(request.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        padded = not bool(mask.all())  # kernels without a mask are faster
        cache, cache_name = DynamicCache(), self._cache_argument
        out = self._network(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        )
        # The prompt was read once per group; from here on each completion has a row.
        cache.batch_repeat_interleave(num)
        logits = out.logits[:, -1].float().repeat_interleave(num, 0)
        mask = mask.repeat_interleave(num, 0)
        positions = mask.sum(1)
        rows = np.arange(len(logits))
        """The completion in each row of the cache."""
        tokens = np.full((len(rows), request.max_completion_length), self._ids.pad, np.int32)
        logprobs = np.zeros((len(rows), request.max_completion_length), np.float32)
        lengths = np.zeros(len(rows), np.int32)
        ended = np.zeros(len(rows), np.bool_)
        for t in range(request.max_completion_length):
            if t % self._poll_every == 0 and should_stop():
                return None
            keys = request.streams[rows]
            chosen, chosen_logprobs = choose(logits, request.temperature, keys, t, request.cut)
            picked = chosen.cpu().numpy()
            tokens[rows, t] = picked
            logprobs[rows, t] = chosen_logprobs.cpu().numpy()
            lengths[rows] = t + 1
            over = np.isin(picked, self._ids.stops)
            ended[rows[over]] = True
            alive = np.flatnonzero(~ended[rows])
            if len(alive) == 0 or t + 1 == request.max_completion_length:
                break
            if len(alive) <= 0.75 * len(rows):  # ended rows stay until a copy is worth it
                keep = torch.from_numpy(alive).to(device)
                cache.batch_select_indices(keep)
                chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
                rows = rows[alive]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = self._network(
                input_ids=chosen[:, None],
                attention_mask=mask if padded else None,
                position_ids=positions[:, None],
                use_cache=True,
                **{cache_name: cache},
            )
            logits, positions = out.logits[:, -1].float(), positions + 1
        longest = int(lengths.max(initial=1))
        # Rows that had ended were decoded until the next copy: cut that off.
        beyond = np.arange(longest)[None, :] >= _first_end(tokens[:, :longest], self._ids.stops)[:, None]
        tokens[:, :longest][beyond], logprobs[:, :longest][beyond] = self._ids.pad, 0.0
        lengths = np.minimum(lengths, _first_end(tokens, self._ids.stops)).astype(np.int32)
        longest = int(lengths.max(initial=1))
        return Samples(tokens[:, :longest], logprobs[:, :longest], lengths, ended)

    def _gather(self, network: torch.nn.Module) -> torch.nn.Module:
        """Gather every partitioned parameter into the replica, a bounded number of bytes at a time.
        Collective: all ranks gather the same parameters in the same order, and each keeps a full copy."""
        import deepspeed

        if self._replica is None:
            self._replica = self._build_replica().to(self._group.device)
        theirs, ours = dict(network.named_parameters()), dict(self._replica.named_parameters())
        sizes = {n: getattr(p, "ds_numel", p.numel()) * p.element_size() for n, p in theirs.items()}
        for names in portions(theirs, sizes.__getitem__, _GATHER_BYTES):
            with deepspeed.zero.GatheredParameters([theirs[name] for name in names]):
                for name in names:
                    # A clone: DeepSpeed frees the gathered memory when the context ends.
                    ours[name].data = theirs[name].data.clone()
        # Buffers (rotary frequencies) are not partitioned.
        for name, buffer in network.named_buffers():
            self._replica.get_buffer(name).data = buffer.data.clone()
        return self._replica


def choose(
    logits: torch.Tensor, temperature: float, keys: npt.NDArray[np.uint64], position: int, cut: Cut = WHOLE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token, its log-probability) of each row of logits (rows, vocab), by inverting the distribution.

    The token is the first whose cumulative probability exceeds u. torch.multinomial would draw from one
    stream for the whole batch, so a row's token would depend on the other rows.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logits.argmax(-1)
        return token, logprobs.gather(-1, token[:, None])[:, 0]
    logprobs = (logits / temperature).log_softmax(-1)
    draws = torch.from_numpy(uniforms(keys, position)).to(logits.device)
    # float64: over a vocabulary of 10^5, sums in fp32 would lose the tail. A few rows at a time, to save
    # memory.
    parts = []
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        if cut != WHOLE:
            logprobs[rows] = truncated(logprobs[rows], cut)
        cumulative = logprobs[rows].double().exp().cumsum(-1)
        # Times the last sum, which rounding leaves near 1: a u close to 1 must still find a token.
        target = draws[rows, None] * cumulative[:, -1:]
        parts.append(torch.searchsorted(cumulative, target, right=True)[:, 0])
    token = torch.cat(parts).clamp_max(logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def truncated(logprobs: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return log-probabilities (rows, vocab) after top-k, min-p and top-p, normalised again; -inf elsewhere.

    Top-p (Holtzman et al., arXiv 1904.09751) keeps the token that crosses the mark, so at least one; among
    equally likely ones the lower id comes first. Min-p: arXiv 2407.01082.
    """
    ranked, order = logprobs.sort(stable=True, dim=-1, descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if cut.top_k:
        keep[:, cut.top_k :] = False
    if cut.min_p:
        keep &= ranked >= ranked[:, :1] + math.log(cut.min_p)
    if cut.top_p < 1:
        left = torch.where(keep, ranked, -torch.inf).log_softmax(-1).double().exp()
        keep &= left.cumsum(-1) - left < cut.top_p
    kept = torch.where(keep, ranked, -torch.inf).log_softmax(-1)
    return torch.empty_like(kept).scatter_(-1, order, kept)


def fingerprint(network: torch.nn.Module) -> str:
    """Return an id of the weights by their bits: the sum of each tensor's bit patterns, mixed in order. It
    tells the states of a training run apart; it is no defence against somebody who forges one."""
    total = 0
    for parameter in network.parameters():
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        # In slices: a sum of integers copies them to 64 bits first, gigabytes for an embedding.
        flat = parameter.detach().view(whole).flatten()
        slices = [flat[first : first + _SUMMED] for first in range(0, len(flat), _SUMMED)]
        bits = int(torch.stack([part.sum(dtype=torch.int64) for part in slices]).sum()) if slices else 0
        total = (total * 0x100000001B3 + bits) % (1 << 64)
    return f"{total:016x}"


def cache_argument(network: Any) -> str:
    """Return the cache argument's name; transformers renames past_key_values, model by model."""
    # Check the model's body: a decorator on the head's forward translates the old name.
    known = inspect.signature(inspect.unwrap(type(base_model(network)).forward)).parameters
    return "cache" if "cache" in known else "past_key_values"


def _first_end(tokens: npt.NDArray[np.int32], stops: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return how many tokens each row has up to its first end token, inclusive; all if it has none."""
    is_end = np.isin(tokens, stops)
    lengths: npt.NDArray[np.int64] = np.where(is_end.any(1), is_end.argmax(1) + 1, tokens.shape[1])
    return lengths
