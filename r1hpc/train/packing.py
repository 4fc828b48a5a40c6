"""Documents side by side in a row, each as if it were alone: positions from 0, attention inside itself.

    inputs, positions = map(packed_form(attn_implementation), (inputs, positions))
    engine(input_ids=inputs, position_ids=positions)
    check_apart(engine, attn_implementation)            # once, before the first step

transformers finds where a document begins by its positions (masking_utils.find_packed_sequence_indices) and
hides the others: by a mask of blocks where the attention takes a mask, which sdpa does, and by the lengths
where it is flash attention, then in one row for the whole micro batch. Whether a family does so is not taken
on trust: one that carries a state along the row, or builds its mask otherwise, is refused by check_apart.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from r1hpc.base.errors import ConfigError

_LENGTH = 6
"""Tokens of each of the two documents that are tried."""
_MOST = 1e-2
"""Of the spread of the logits: what another order of adding up may change them by."""


def packed_form(attn_implementation: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """How the rows of a micro batch (rows, T) lie: as they are, or for flash attention all in one."""
    if attn_implementation.startswith("flash"):
        return lambda values: values.reshape(1, -1)
    return lambda values: values


@torch.no_grad()
def check_apart(engine: Any, attn_implementation: str) -> None:
    """Refuse a model in which a document sees the one before it in its row. Collective.

    Raises:
        ConfigError: what the first document says changes the logits of the second.
    """
    network = engine.module
    if "position_ids" not in inspect.signature(_causal_lm(network).forward).parameters:
        raise _refused(network, attn_implementation)
    was_training = network.training
    engine.eval()
    one, other = (_second_of_two(engine, first) for first in (0, 1))
    engine.train(was_training)
    if float((one - other).abs().max()) > _MOST * float(one.std()):
        raise _refused(network, attn_implementation)


def _second_of_two(engine: Any, token: int) -> torch.Tensor:
    """Logits of the second document, where the first is made of `token`."""
    first, second = [token] * _LENGTH, [0, 1] * (_LENGTH // 2)
    ids = torch.tensor([first + second], device=engine.device)
    positions = torch.tensor([list(range(_LENGTH)) * 2], device=engine.device)
    logits: torch.Tensor = engine(input_ids=ids, position_ids=positions).logits
    return logits[0, _LENGTH:].float()


def _causal_lm(network: Any) -> Any:
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _refused(network: Any, attn_implementation: str) -> ConfigError:
    return ConfigError(
        f"data.packing: a {type(_causal_lm(network)).__name__} with model.attn_implementation="
        f"{attn_implementation} does not keep the documents of a row apart: set data.packing=false"
    )
