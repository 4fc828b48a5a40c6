"""Share every sequence among the ranks of a group: sequence parallelism (Ulysses, arXiv 2309.14509).

A model computes token by token except in its attention. There the ranks of a group exchange: each gets some
heads of the complete sequence, attends, and returns to the others the results for their tokens.

DeepSpeed is not told: it sees every rank as data parallel, so it sums all gradients and divides by the
number of ranks under every ZeRO stage. With sequence_parallel_size set, its stages 0 to 2 divide by the
number of groups and stage 3 by the number of ranks. No loss shows that, but it spoils clipping.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from r1hpc.base.errors import ConfigError
from r1hpc.train.model.attention import base_model, exchangeable
from r1hpc.train.parallel.distributed import Group

PREFIX = "ulysses_"
"""Before an attention's name: the same attention with its heads shared by the ranks of a group."""
_REFUSED = ("s_aux", "position_bias", "indices")
"""Attention arguments that some models need per head, or for some tokens only."""
_TRIED = 8
_MOST, _MOST_FP32 = 0.05, 1e-3
"""Change of the logits allowed by rounding, relative to their spread, as a root mean square."""

Ints = npt.NDArray[np.int64]
Values = TypeVar("Values", Tensor, npt.NDArray[Any])


@dataclass(frozen=True)
class SequenceGroup:
    """Consecutive ranks that read a part each of the same samples: rank `index` of `size`."""

    size: int = 1
    index: int = 0
    data_rank: int = 0
    """Index of this group: its place in data parallelism."""
    data_world_size: int = 1
    ranks: Any = None
    """torch's process group; None for a single rank."""

    def part(self, values: Values) -> Values:
        """Return this rank's part of the last axis, which `size` divides; a view."""
        width = values.shape[-1] // self.size
        return values[..., self.index * width : (self.index + 1) * width]

    def padded(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Pad with zeros on the right until `size` divides the last axis minus one: inputs and targets."""
        missing = -(tokens.shape[-1] - 1) % self.size
        return np.pad(tokens, [(0, 0)] * (tokens.ndim - 1) + [(0, missing)]) if missing else tokens

    def positions(self, part: Tensor) -> Tensor:
        """Return the positions of a part's tokens (rows, width) in their sequence; the same shape."""
        rows, width = part.shape
        first = self.index * width
        return torch.arange(first, first + width, device=part.device).expand(rows, -1)

    def attend(self, engine: Any, implementation: str) -> None:
        """Make the model attend over the whole group, and test it. Collective.

        `implementation` is the model's attention, by transformers' name. Raise ConfigError on all ranks if
        the model's logits differ from those of complete sequences.
        """
        if self.size == 1:
            return
        network = base_model(engine.module)
        if not _only_attends(network):
            raise _refused(network, implementation)
        vocabulary = network.config.get_text_config().vocab_size
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, _TRIED * self.size), generator=draws).to(engine.device)
        whole = self.part(_logits(engine, ids, torch.arange(ids.shape[1], device=ids.device)[None]).mT).mT
        _register(implementation, self)
        network.set_attn_implementation(PREFIX + implementation)
        mine = self.part(ids)
        difference = _logits(engine, mine, self.positions(mine)) - whole
        most = _MOST_FP32 if next(network.parameters()).dtype == torch.float32 else _MOST
        unlike = ~(difference.square().mean().sqrt() <= most * whole.std())
        dist.all_reduce(failed := unlike.double())
        if failed:
            raise _refused(network, implementation)


def share_sequences(group: Group, size: int) -> SequenceGroup:
    """Return this rank's group of `size` consecutive ranks; `size` divides their number. Collective."""
    if size == 1:
        return SequenceGroup(data_rank=group.rank, data_world_size=group.world_size)
    data_rank, index = divmod(group.rank, size)
    found = None
    for first in range(0, group.world_size, size):  # every rank takes part in making every group
        ranks = dist.new_group(list(range(first, first + size)))
        found = ranks if first == data_rank * size else found
    return SequenceGroup(size, index, data_rank, group.world_size // size, found)


def own_name(implementation: str) -> str:
    """Return an attention's name without the prefix of `SequenceGroup.attend`."""
    return implementation.removeprefix(PREFIX)


def _register(implementation: str, sequence: SequenceGroup) -> None:
    """Register the attention under its prefixed name, with the mask of complete sequences."""
    attention = ALL_ATTENTION_FUNCTIONS[implementation]
    mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]

    def of_whole(*, q_length: int, kv_length: int, **rest: Any) -> Any:
        return mask(q_length=q_length * sequence.size, kv_length=kv_length * sequence.size, **rest)

    AttentionInterface.register(PREFIX + implementation, _shared(attention, sequence))
    AttentionMaskInterface.register(PREFIX + implementation, of_whole)


def _shared(attention: Callable[..., Any], sequence: SequenceGroup) -> Callable[..., Any]:
    """Return `attention`, called by transformers with this rank's tokens, on its heads of all tokens."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, None]:
        asked = [name for name in _REFUSED if rest.get(name) is not None]
        odd = [heads.shape[1] for heads in (query, key, value) if heads.shape[1] % sequence.size]
        if asked or odd:
            why = f"asks for {', '.join(asked)}" if asked else f"has {odd[0]} heads"
            raise ConfigError(
                f"train.sequence_parallel={sequence.size} divides attention by its heads, and "
                f"{type(module).__name__} {why}: set another train.sequence_parallel, or 1"
            )
        # (batch, heads, T / size, head_dim) -> (batch, heads / size, T, head_dim)
        heads = [_exchanged(each, sequence) for each in (query, key, value)]
        output, _ = attention(module, *heads, attention_mask, **rest)
        # (batch, T, heads / size, head_dim) -> (batch, T / size, heads, head_dim)
        return _exchanged(output, sequence), None

    return attend


def _exchanged(values: Tensor, sequence: SequenceGroup) -> Tensor:
    """Exchange parts of two axes: (batch, size x a, b, width) -> (batch, a, size x b, width)."""
    split = values.unflatten(1, (sequence.size, -1)).movedim(1, 0)  # type: ignore[no-untyped-call]
    received: Tensor = _Exchange.apply(split, sequence.ranks)  # type: ignore[no-untyped-call]
    return received.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Send item i of the first axis to rank i of the group, whose item takes its place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        values = values.contiguous()
        received = torch.empty_like(values)
        dist.all_to_all_single(received, values, group=ranks)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The exchange is its own transpose: gradients return to where values came from.
        found: Tensor = _Exchange.apply(gradients[0], ctx.ranks)  # type: ignore[no-untyped-call]
        return found, None


@torch.no_grad()
def _logits(engine: Any, ids: Tensor, positions: Tensor) -> Tensor:
    """Return (1, tokens, vocab) in fp32, without dropout."""
    was_training = engine.module.training
    engine.eval()
    logits: Tensor = engine(input_ids=ids, position_ids=positions).logits.float()
    engine.train(was_training)
    return logits


def _only_attends(network: Any) -> bool:
    """True if each layer uses an exchangeable attention at given positions, and none convolves.

    With random weights a state along the sequence can be too faint for the test, which is also too short for
    queries scaled by their token count (Llama 4).
    """
    config = network.config.get_text_config()
    layers = config.num_hidden_layers
    return (
        not getattr(config, "attn_temperature_tuning", False)
        and "position_ids" in inspect.signature(network.forward).parameters
        and sum(1 for _ in exchangeable(network)) >= layers
        and not any(isinstance(module, nn.Conv1d) for module in network.modules())
    )


def _refused(network: Any, implementation: str) -> ConfigError:
    return ConfigError(
        f"train.sequence_parallel: a {type(network).__name__} with model.attn_implementation={implementation}"
        " computes other results on parts of a sequence than on all of it: set train.sequence_parallel=1"
    )
