"""Compute log-probabilities of chosen tokens without holding all logits at once.

In fp32 the logits of 32,768 tokens over a vocabulary of 152,000 take 18.6 GiB, and a loss's backward pass
holds three such tensors. So while the model runs, its output head is replaced: it takes the hidden states of
the chosen tokens, a chunk at a time, and returns three numbers for each. The backward pass computes a chunk's
logits again (activation checkpointing, torch.utils.checkpoint): one more product with the head.

The head runs inside the model's forward pass, as a module: ZeRO 3 gathers its weights once for all chunks,
and its adapters count. Some families change the logits after the head (Gemma's cap, Cohere's and Granite's
scale). The first call finds out, and for them the logits stay complete.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from r1hpc.plan.memory.step import logits_at_once

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
        scoring = _Scoring(
            picked,
            chosen,
            self._chunk,
            temperature=temperature,
            with_entropies=with_entropies,
            differentiate_entropies=differentiate_entropies,
            teacher=teacher,
        )
        if self._is_last is not False:
            with _in_place_of_forward(self._head, scoring.in_place_of):
                answer = run()
            if self._is_last is None:
                self._is_last = scoring.passed_unchanged(answer)
            if self._is_last:
                return Scores(*answer[:num_chosen].unbind(-1))
        of_teacher = None if teacher is None else teacher.logits
        values = scoring.score(nn.Identity(), _picked(run(), chosen), picked, of_teacher)
        return Scores(*values[:num_chosen].unbind(-1))

    def logits(self, run: Callable[[], Tensor], targets: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return (num_chosen, vocab), at least one row: the logits of the tokens `scores` would get, in the
        model's precision, with its family's changes after the head."""
        chosen, _ = _some(targets, chosen)
        with _in_place_of_forward(self._head, lambda head, hidden: head(_picked(hidden, chosen)[None])):
            return run()[0]


@dataclass
class _Scoring:
    """One call of OutputHead.scores, with its arguments."""

    targets: Tensor
    """(num_chosen,), like the teacher's logits."""
    chosen: Tensor | None
    chunk: int
    temperature: float
    with_entropies: bool
    differentiate_entropies: bool
    teacher: Teacher | None
    given: Tensor | None = None
    """The last answer of `in_place_of`."""

    def in_place_of(self, head: Apply, hidden: Tensor) -> Tensor:
        """Return (num_chosen, 3), in place of the head's logits of hidden states (rows, k, width)."""
        states = _picked(hidden, self.chosen)
        parts = torch.split(states, self.chunk)
        of_teacher: Sequence[Tensor | None] = [None] * len(parts)
        if self.teacher is not None:
            of_teacher = torch.split(self.teacher.logits, self.chunk)
        score: Callable[..., Tensor] = self.score
        if torch.is_grad_enabled() and len(parts) > 1:  # the backward pass computes the logits again
            score = partial(checkpoint, self.score, use_reentrant=False, preserve_rng_state=False)
        chunks = zip(parts, torch.split(self.targets, self.chunk), of_teacher, strict=True)
        answer = torch.cat([score(head, *each) for each in chunks])
        self.given = answer.detach()
        return answer

    def score(self, head: Apply, states: Tensor, targets: Tensor, of_teacher: Tensor | None) -> Tensor:
        """Map (n, width), (n,) and a teacher's logits (n, vocab) to (n, 3), the columns of Scores."""
        logits = _tempered(head(states), self.temperature)
        logprobs = -F.cross_entropy(logits, targets, reduction="none")
        entropies = divergences = torch.zeros_like(logprobs)
        if self.with_entropies:
            entropies = _entropies(logits, self.differentiate_entropies)
        if self.teacher is not None and of_teacher is not None:
            divergences = divergence(logits, _tempered(of_teacher, self.temperature), self.teacher.beta)
        return torch.stack([logprobs, entropies, divergences], -1)

    def passed_unchanged(self, answer: Tensor) -> bool:
        """True if the model returned this answer in place of its logits as it was given."""
        given = self.given
        if given is None or answer.shape != given.shape:
            return False
        return torch.equal(answer.nan_to_num(), given.nan_to_num())


def _some(targets: Tensor, chosen: Tensor | None) -> tuple[Tensor | None, int]:
    """Return at least one position, and how many were requested. A rank without any takes part too: its
    head's weights need a gradient of 0, and the first call must find out about the model on every rank."""
    num = targets.numel() if chosen is None else len(chosen)
    if num:
        return chosen, num
    return torch.zeros(1, dtype=torch.int64, device=targets.device), 0


def _picked(values: Tensor, chosen: Tensor | None) -> Tensor:
    """Map (rows, k, width) to (num_chosen, width)."""
    return values.flatten(0, 1) if chosen is None else values.flatten(0, 1)[chosen]


def _entropies(logits: Tensor, differentiate: bool) -> Tensor:
    # A function of its own, so that its (n, vocab) tensor is gone before the divergence makes more.
    with torch.set_grad_enabled(differentiate and torch.is_grad_enabled()):
        every = logits.log_softmax(-1)
        return -(every.exp() * every).sum(-1)


def divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return (n,) divergences in nats between two distributions given as (n, vocab) logits.

    beta KL(P, M) + (1 - beta) KL(Q, M) with P the teacher, Q the student, M = beta P + (1 - beta) Q: the
    generalised Jensen-Shannon divergence of GKD, 2306.13649, section 2. Towards 0 and 1 it vanishes, and its
    gradient becomes that of beta KL(P, Q) and of (1 - beta) KL(Q, P); at 0 and 1 it is KL(P, Q), the forward,
    and KL(Q, P), the reverse KL, themselves.

    Entries that only the larger vocabulary has are padding of its embedding, and ignored.
    """
    shared = min(student.shape[-1], teacher.shape[-1])
    q, p = student[..., :shared].log_softmax(-1), teacher[..., :shared].log_softmax(-1)
    if beta in (0, 1):
        return _kl(q, p) if beta else _kl(p, q)
    mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, mixture) + (1 - beta) * _kl(q, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


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
