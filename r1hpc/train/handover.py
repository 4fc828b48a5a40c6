"""Handing the policy to an engine with weights of its own, and the proof that it has them.

    config = served_config(network)                 # what the engine is built from
    for name, value in served_weights(network): ... # every tensor; all ranks together
    difference = measure(network, sample, ids, longest)
    check(difference, handover_limit(config), group)  # TrainError on all ranks, if one is above

That a hand-over raised nothing says little. vLLM 0.32 on a CPU keeps a packed copy of a tied output head that
a reload does not reach, and samples from the new layers under the old head without a word; so a tied head is
sent, and served, as a tensor of its own. The proof asks for a few completions of made-up prompts and compares
their log-probabilities with the trainer's own: it sees a head or a layer that was left out, and a policy of
before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r1hpc.config.schema import Precision, RunConfig
from r1hpc.tasks.tokenizer import SpecialIds
from r1hpc.train.algorithms import Floats
from r1hpc.train.distributed import Group
from r1hpc.train.errors import TrainError
from r1hpc.train.export import exported_config, weights_of
from r1hpc.train.sampling import Request, Samples, logprob_limit, streams

_NUM_PROMPTS = 8
_LONGEST_PROMPT = 16
_LONGEST_COMPLETION = 16


@dataclass(frozen=True)
class Difference:
    """|log-probability by the engine - by the trainer| over the tokens of the completions, in nats."""

    mean: float
    largest: float


def served_config(network: Any) -> dict[str, Any]:
    """The config.json that the engine is built from: the exported one, with an output head of its own."""
    return {**exported_config(network), "tie_word_embeddings": False}


def served_weights(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in an export, value), adapters merged, a tied head under its own name too.

    Under ZeRO 3 collective: a tensor is gathered when it is asked for. Its value stays what it is afterwards,
    as engines keep several of a layer until they have all of it; the rest are not copied.
    """
    for weight in weights_of(network, every_name=True):
        with weight.whole() as value:
            # DeepSpeed takes the memory of a gathered tensor back.
            kept = value.clone() if hasattr(weight.tensor, "ds_id") else value
        yield weight.name, kept


def handover_limit(config: RunConfig) -> float:
    """What `check` allows: sampling.logprob_limit, in half precision three times its default.

    A model is unsure of random tokens, and rounding moves what is improbable more. Measured on a CPU in bf16:
    0.070 for SmolLM2-135M, 0.024 for a tiny Qwen2 with large weights.
    """
    limit = logprob_limit(config)
    is_rounded = config.train.precision is not Precision.fp32
    return 3 * limit if is_rounded and config.rollout.max_logprob_difference is None else limit


def measure(
    network: Any,
    sample: Callable[[Request], Samples],
    ids: SpecialIds,
    longest: int,
    device: torch.device,
) -> Difference:
    """How far the engine's log-probabilities of its own completions are from the trainer's. Under ZeRO 3
    collective.

    Args:
        longest: tokens of prompt and completion that the engine takes.
    """
    request = _request(network.config.get_text_config().vocab_size, longest)
    samples = sample(request)
    ours = _logprobs(network, request, samples, device)
    inside = np.arange(samples.tokens.shape[1])[None, :] < samples.lengths[:, None]
    off = np.abs(ours - samples.logprobs)[inside]
    return Difference(float(off.mean()), float(off.max()))


def check(difference: Difference, limit: float, group: Group) -> None:
    """Refuse, on all ranks alike, an engine whose log-probabilities are not the trainer's.

    Raises:
        TrainError: on some rank the mean is above `limit`, or is not a number.
    """
    means = group.gather(difference.mean)
    rank = int(np.argmax(np.nan_to_num(means, nan=np.inf)))
    if means[rank] <= limit:
        return
    raise TrainError(
        f"after the hand-over vLLM does not compute what the trainer does: on rank {rank} the "
        f"log-probabilities of the same tokens are {means[rank]:.3g} nats apart on average, and "
        f"rollout.max_logprob_difference is {limit:g}. It samples from other weights, or this model needs "
        "another precision or vLLM: begin a run with rollout.engine=sampler from an export of this one; or, "
        "where the difference is rounding, raise the limit and resume"
    )


def _request(vocab_size: int, longest: int) -> Request:
    """Prompts of random tokens, all of one length; always the same ones."""
    completion = max(1, min(_LONGEST_COMPLETION, longest // 2))
    prompt = max(1, min(_LONGEST_PROMPT, longest - completion))
    tokens = np.random.default_rng(0).integers(0, vocab_size, (_NUM_PROMPTS, prompt))
    return Request(tokens.tolist(), streams(0, range(_NUM_PROMPTS), 1), 1, completion, 1.0)


@torch.no_grad()
def _logprobs(network: Any, request: Request, samples: Samples, device: torch.device) -> Floats:
    """(n, longest): of the sampled tokens by the network, as it computes in training but for dropout."""
    ids = np.concatenate([np.array(request.prompts), samples.tokens], 1)
    tokens, num = torch.from_numpy(ids).to(device), samples.tokens.shape[1]
    was_training = network.training
    network.eval()
    try:
        logits = network(input_ids=tokens[:, :-1], logits_to_keep=num).logits
    finally:
        network.train(was_training)
    found: Floats = (
        logits.float().log_softmax(-1).gather(-1, tokens[:, -num:, None])[..., 0].double().cpu().numpy()
    )
    return found
