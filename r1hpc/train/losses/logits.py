"""Compute log-probabilities and entropies of chosen tokens, without holding all logits at once.

    head = OutputHead(policy, chunk_tokens=None)
    scores = head.scores(lambda: engine(input_ids=ids).logits, targets, chosen)      # each (num_chosen,)
    loss = -scores.logprobs.sum()

In fp32 the logits of 32,768 tokens over a vocabulary of 152,000 take 18.6 GiB, and a loss's backward pass
holds three such tensors. So while the model runs, its output head is replaced: it takes the hidden states of
the chosen tokens, a chunk at a time, and returns three numbers for each. The backward pass computes a chunk's
logits again (activation checkpointing, torch.utils.checkpoint): one more product with the head.

The head runs inside the model's forward pass, as a module: ZeRO 3 gathers its weights once for all chunks,
and its adapters count. Some families change the logits after the head (Gemma's cap, Cohere's and Granite's
scale). The first call finds out, and for them the logits stay complete.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from r1hpc.plan.memory.step import logits_at_once
from r1hpc.train.losses.algorithms import divergence

Apply = Callable[[Tensor], Tensor]
"""Maps hidden states (n, hidden_size) to logits (n, vocab)."""


@dataclass(frozen=True)
class Scores:
    """Results for the chosen tokens, each (num_chosen,) in fp32."""

    logprobs: Tensor
    entropies: Tensor
    """In nats, of the distribution each target was drawn from; zeros if not requested."""
    divergences: Tensor
    """In nats, between that distribution and a teacher's; zeros without a teacher."""


@dataclass(frozen=True)
class Teacher:
    """The distribution a student's is compared with, token by token."""

    logits: Tensor
    """(num_chosen, its vocab), at least one row, from OutputHead.logits."""
    beta: float
    """See algorithms.divergence."""


@dataclass(frozen=True)
class _Asked:
    targets: Tensor
    """(num_chosen,)."""
    chosen: Tensor | None
    temperature: float
    with_entropies: bool
    differentiate_entropies: bool
    teacher: Tensor | None
    """(num_chosen, its vocab)."""
    beta: float


class OutputHead:
    """The output head of a causal language model; under ZeRO 3 its weights are divided over the ranks."""

    def __init__(self, policy: Any, chunk_tokens: int | None) -> None:
        """`chunk_tokens` is train.logits_chunk_tokens; `policy` may be wrapped by peft."""
        self._head: nn.Module = policy.get_output_embeddings()
        self._chunk = logits_at_once(chunk_tokens, policy.config.get_text_config().vocab_size)
        self._is_last: bool | None = None
        """True if the model returns its head's output unchanged; None: not known yet."""

    def scores(
        self,
        run: Callable[[], Tensor],
        targets: Tensor,
        chosen: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropies: bool = False,
        differentiate_entropies: bool = False,
        teacher: Teacher | None = None,
    ) -> Scores:
        """Score the tokens of `targets` (rows, k) at the flat positions `chosen` (num_chosen,); None: all.

        Positions come from the host, not a mask: selecting by a mask makes the host wait for the GPU.

        Args:
            run: a forward pass of the model with logits (rows, k, vocab); returns them.
                Called once; the first time twice, for a family that changes its logits.
            temperature: the logits are divided by it, a teacher's too.
            differentiate_entropies: they are part of the loss.
            teacher: its logits of the same tokens, in the same order.
        """
        chosen, num_chosen = _some(targets, chosen)
        picked = targets.flatten() if chosen is None else targets.flatten()[chosen]
        told, beta = (teacher.logits, teacher.beta) if teacher else (None, 1.0)
        asked = _Asked(picked, chosen, temperature, with_entropies, differentiate_entropies, told, beta)
        if self._is_last is not False:
            given: list[Tensor] = []
            with _in_place_of_forward(self._head, partial(self._answer, asked, given)):
                answer = run()
            if self._is_last is None:
                self._is_last = answer.shape == given[0].shape and torch.equal(
                    answer.nan_to_num(), given[0].nan_to_num()
                )
            if self._is_last:
                return _scores(answer[:num_chosen])
        whole = _score(lambda logits: logits, asked, _picked(run(), chosen), picked, told)
        return _scores(whole[:num_chosen])

    def logits(self, run: Callable[[], Tensor], targets: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return (num_chosen, vocab), at least one row: the logits of the tokens `scores` would get, in the
        model's precision, with its family's changes after the head."""
        chosen, _ = _some(targets, chosen)

        def only_chosen(apply: Apply, hidden: Tensor) -> Tensor:
            return apply(_picked(hidden, chosen)[None])

        with _in_place_of_forward(self._head, only_chosen):
            return run()[0]

    def _answer(self, asked: _Asked, given: list[Tensor], apply: Apply, hidden: Tensor) -> Tensor:
        """Return (num_chosen, 3), in place of the head's logits."""
        states = _picked(hidden, asked.chosen)
        pieces = _chunks(self._chunk, states, asked.targets, asked.teacher)
        again = torch.is_grad_enabled() and len(states) > self._chunk
        function = partial(_again, _score) if again else _score
        answer = torch.cat([function(apply, asked, *piece) for piece in pieces])
        given.append(answer.detach())
        return answer


def _again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call `function` without keeping inner results; the backward pass computes them again."""
    found: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return found


def _some(targets: Tensor, chosen: Tensor | None) -> tuple[Tensor | None, int]:
    """Return at least one position, and how many were requested.

    A rank without any takes part too: its head's weights need a gradient of 0, and the first call must find
    out about the model on every rank.
    """
    num = targets.numel() if chosen is None else len(chosen)
    if num:
        return chosen, num
    return torch.zeros(1, dtype=torch.int64, device=targets.device), 0


def _chunks(
    size: int, states: Tensor, targets: Tensor, told: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    states_in, targets_in = torch.split(states, size), torch.split(targets, size)
    told_in = [None] * len(states_in) if told is None else torch.split(told, size)
    return zip(states_in, targets_in, told_in, strict=True)


def _scores(columns: Tensor) -> Scores:
    """Return the Scores in the columns of `_score`."""
    logprobs, entropies, divergences = columns.unbind(-1)
    return Scores(logprobs, entropies, divergences)


def _picked(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Map (rows, k, width) to (num_chosen, width)."""
    return values.flatten(0, 1) if chosen is None else values.flatten(0, 1)[chosen]


def _score(apply: Apply, asked: _Asked, states: Tensor, targets: Tensor, told: Tensor | None) -> Tensor:
    """Map (n, width), (n,) and a teacher's logits (n, vocab) to (n, 3): log-probability of each target,
    entropy, and divergence to the teacher."""
    logits = _tempered(apply(states), asked.temperature)
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    zeros = torch.zeros_like(logprobs)
    entropies = _entropies(logits, asked.differentiate_entropies) if asked.with_entropies else zeros
    if told is None:
        return torch.stack([logprobs, entropies, zeros], -1)
    apart = divergence(logits, _tempered(told, asked.temperature), asked.beta)
    return torch.stack([logprobs, entropies, apart], -1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def _entropies(logits: Tensor, differentiate: bool) -> Tensor:
    with torch.set_grad_enabled(differentiate and torch.is_grad_enabled()):
        every = logits.log_softmax(-1)
        return -(every.exp() * every).sum(-1)


@contextmanager
def _in_place_of_forward(module: nn.Module, function: Callable[[Apply, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module returns function(its own forward pass, its input); its hooks still run."""
    own, forward = module.__dict__.get("forward"), module.forward
    module.forward = partial(function, forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
