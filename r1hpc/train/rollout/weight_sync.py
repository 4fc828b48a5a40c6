"""Yield the policy's weights for an engine that keeps a copy of them, and check that the engine has them.

Used by vllm_engine.py. A transfer without an error proves little. vLLM 0.32 on a CPU keeps a packed copy of a
tied output head that a reload misses, and silently samples from the new layers under the old head; so a tied
head is sent as a separate tensor. The proof samples a few completions of made-up prompts and compares their
log-probabilities with the trainer's: it notices a head or a layer that was left out. Half precision rounds so
much that a policy one small update old would pass any fixed limit. So an engine is judged by what its other
checks showed. It is also refused if it repeats its last proof to the bit (seen on a CPU), while the trainer
does not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.train.model.export import exported_config, weights_of
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import TrainError
from r1hpc.train.rollout.torch_engine import Request, Samples, logprob_limit, streams

Floats = npt.NDArray[np.float64]

_NUM_PROMPTS = 8
_LONGEST_PROMPT = 16
_LONGEST_COMPLETION = 16
_NUM_USUAL = 3
"""First checks of an engine that show what is usual for it, and latest ones: rounding may grow with time."""
_MOST_USUAL = 2.5
_USUAL_FLOOR = 1e-3
"""A difference of over _MOST_USUAL times the largest of those is refused, above this many nats. One stale
matrix moved 0.00097 to 0.0036; from check to check 1.4 times the usual were seen."""
_MOVED = 1e-4
"""Nats per token from which the trainer's log-probabilities are those of another policy."""


@dataclass(frozen=True)
class Proof:
    """Completions of made-up prompts, and their tokens' log-probabilities in nats; each (n, longest)."""

    policy_id: str
    tokens: npt.NDArray[np.int32]
    inside: npt.NDArray[np.bool_]
    engine: npt.NDArray[np.float32]
    trainer: Floats

    @property
    def mean(self) -> float:
        """Return |by the engine - by the trainer| over the tokens."""
        return float(self._off().mean())

    @property
    def largest(self) -> float:
        return float(self._off().max())

    def repeats(self, earlier: "Proof") -> bool:
        """True if the engine repeats the earlier values, and the trainer, with other weights, does not."""
        if self.policy_id == earlier.policy_id or not np.array_equal(self.tokens, earlier.tokens):
            return False
        moved = np.abs(self.trainer - earlier.trainer)[self.inside].mean()
        return np.array_equal(self.engine, earlier.engine) and bool(moved > _MOVED)

    def _off(self) -> Floats:
        off: Floats = np.abs(self.trainer - self.engine)[self.inside]
        return off


def served_config(network: Any) -> dict[str, Any]:
    """Return the config.json of the engine: the exported one, with an untied output head."""
    return {**exported_config(network), "tie_word_embeddings": False}


def served_weights(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name in an export, value), with adapters merged and a tied head under its own name too.

    Collective under ZeRO 3: a tensor is gathered on demand, and its value stays valid, as engines keep
    several of a layer until they have all of it. The other stages copy nothing.
    """
    for weight in weights_of(network, every_name=True):
        with weight.whole() as value:
            # DeepSpeed frees the memory of a gathered tensor.
            kept = value.clone() if hasattr(weight.tensor, "ds_id") else value
        yield weight.name, kept


def handover_limit(config: RunConfig) -> float:
    """Return the limit of `check`: torch_engine.logprob_limit, in half precision three times its default.

    A model is unsure of random tokens, and rounding changes small probabilities more. On a CPU in bf16:
    0.070 for SmolLM2-135M, 0.024 for a tiny Qwen2 with large weights.
    """
    limit = logprob_limit(config)
    is_rounded = config.train.precision is not Precision.fp32
    return 3 * limit if is_rounded and config.rollout.max_logprob_difference is None else limit


def usual_limit(config: RunConfig, passed: Sequence[float]) -> float:
    """Return handover_limit, or in half precision the tighter limit that the differences of this engine that
    `passed` give: of its first and its latest checks. A limit that the user set stays."""
    limit = handover_limit(config)
    is_exact = config.train.precision is Precision.fp32 or config.rollout.max_logprob_difference is not None
    if is_exact or len(passed) < _NUM_USUAL:
        return limit
    return min(limit, max(_USUAL_FLOOR, _MOST_USUAL * max(*passed[:_NUM_USUAL], *passed[-_NUM_USUAL:])))


def prove(
    network: Any, policy_id: str, sample: Callable[[Request], Samples], longest: int, device: torch.device
) -> Proof:
    """Return the engine's completions, with its log-probabilities and the trainer's. Collective under ZeRO 3.
    `longest` is how many tokens of prompt and completion the engine takes."""
    # Random tokens, always the same.
    completion = max(1, min(_LONGEST_COMPLETION, longest // 2))
    length = max(1, min(_LONGEST_PROMPT, longest - completion))
    vocab_size = network.config.get_text_config().vocab_size
    prompts = np.random.default_rng(0).integers(0, vocab_size, (_NUM_PROMPTS, length)).tolist()
    request = Request(prompts, streams(0, range(_NUM_PROMPTS), 1), 1, completion, 1.0)
    samples = sample(request)
    ours = _logprobs(network, request, samples, device)
    inside = np.arange(samples.tokens.shape[1])[None, :] < samples.lengths[:, None]
    return Proof(policy_id, samples.tokens, inside, samples.logprobs, ours)


def check(proof: Proof, earlier: Proof | None, limit: float, group: Group) -> float:
    """Return the largest mean difference of all ranks. Refuse, on all ranks, an engine whose differences from
    the trainer exceed `limit`, or that repeats its `earlier` proof."""
    means: list[float] = group.gather(proof.mean)
    repeated = group.gather(earlier is not None and proof.repeats(earlier))
    if any(repeated):
        raise TrainError(
            f"the hand-over did not reach vLLM: on rank {repeated.index(True)} it computes, to the last bit, "
            "what it did before the updates since, and the trainer does not. Resume, which starts a new "
            "engine, or begin a run with rollout.engine=sampler from an export of this one"
        )
    rank = int(np.argmax(np.nan_to_num(means, nan=np.inf)))
    if means[rank] <= limit:
        return means[rank]
    raise TrainError(
        f"after the hand-over vLLM does not compute what the trainer does: on rank {rank} the "
        f"log-probabilities of the same tokens are {means[rank]:.3g} nats apart on average, and "
        f"the limit is {limit:.3g}. It is rollout.max_logprob_difference, or {_MOST_USUAL:g} times what "
        "earlier checks in bf16 or fp16 showed. vLLM samples from other weights, or this model needs another "
        "precision or vLLM: begin a run with rollout.engine=sampler from an export of this one; or, where "
        "the difference is rounding, set rollout.max_logprob_difference higher and resume"
    )


@torch.no_grad()
def _logprobs(network: Any, request: Request, samples: Samples, device: torch.device) -> Floats:
    """Return (n, longest): the sampled tokens by the network, as in training but without dropout."""
    ids = np.concatenate([np.array(request.prompts), samples.tokens], 1)
    tokens, num = torch.from_numpy(ids).to(device), samples.tokens.shape[1]
    was_training = network.training
    network.eval()
    try:
        logits = network(input_ids=tokens[:, :-1], logits_to_keep=num).logits
    finally:
        network.train(was_training)
    found = logits.float().log_softmax(-1).gather(-1, tokens[:, -num:, None])[..., 0]
    values: Floats = found.double().cpu().numpy()
    return values
