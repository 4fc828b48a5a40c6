"""Add attentions other than softmax to every transformers model whose attention can be replaced.

Importing this file registers with transformers:

    softmax        transformers' own sdpa by another name
    gate           sigmoid(gamma QK^T / sqrt(d)) V: the "dynamic attention gate". Causal, NOT normalised: the
                   size of the output grows with the number of visible tokens
    gate_norm      the same with each row divided by its sum
    sigmoid_bias   sigmoid(QK^T / sqrt(d) + b) V with b = -log n (Ramapuram et al., arXiv 2409.04431), where
                   n is the number of tokens the query sees. The paper fixes n to the context length, but then
                   the past would depend on what follows

gamma is learned, one per layer, and lies on the attention module as `gate_gamma`: `add_gates` adds it to a
built model. Nothing here is fused: all scores are held, as in transformers' eager attention. The import also
keeps transformers' sdpa fused on GPUs in fp32 where query heads share keys and values.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from r1hpc.base.errors import ConfigError
from r1hpc.config.schema.run import OWN_ATTENTIONS

OURS = OWN_ATTENTIONS
"""Implementations whose weights are wrong under any other."""
GAMMA = "gate_gamma"
INITIAL_GAMMA = 0.5

_REFUSED = ("softcap", "s_aux", "position_bias")
"""Features that some models need of their attention and this file does not compute."""


def shares_heads(attention_mask: Tensor | None, key: Tensor, *value: Tensor) -> bool:
    """True to let sdpa share keys and values between query heads; else they are repeated.

    Flash attention has no fp32 and needs Ampere or later, and the memory-efficient kernel shares no heads
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp). That would leave the math kernel, which keeps all
    scores of every layer for the backward pass. Read, not run.
    """
    if key.is_cuda and (key.dtype is torch.float32 or torch.cuda.get_device_capability(key.device) < (8, 0)):
        return False
    shared: bool = _transformers_own(attention_mask, key, *value)
    return shared


_transformers_own = sdpa_attention.use_gqa_in_sdpa
sdpa_attention.use_gqa_in_sdpa = shares_heads


def base_model(network: Any) -> Any:
    """Return the transformers model, also from inside a peft model."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def check_implementation(name: str) -> None:
    """Raise ConfigError if transformers has no attention of this name."""
    known = sorted({"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()})
    if name not in known:
        raise ConfigError(f"model.attn_implementation is {name!r}; known: {', '.join(known)}")


def add_gates(network: nn.Module, implementation: str) -> None:
    """Give every exchangeable attention layer a gamma of 0.5 if `implementation` has one. Raise ConfigError
    if it is of this file and the model's attention is built in."""
    if implementation not in OURS:
        return
    layers = list(exchangeable(network))
    if not layers:
        raise ConfigError(
            f"model.attn_implementation={implementation}: {type(network).__name__} does not take its "
            "attention from transformers' AttentionInterface; use another model_type, or eager"
        )
    for layer in layers if implementation in ("gate", "gate_norm") else ():
        some = next(layer.parameters())
        value = torch.full((1,), INITIAL_GAMMA, dtype=some.dtype, device=some.device)
        layer.register_parameter(GAMMA, nn.Parameter(value))


def load_gates(network: nn.Module, folder: Path) -> None:
    """Load the gammas in the safetensors files of `folder`; without any the initial ones stay. transformers'
    from_pretrained cannot: it knows only what the model's own class creates."""
    gammas = {name: p for name, p in network.named_parameters() if name.endswith(f".{GAMMA}")}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in gammas.keys() & set(file.keys()):
                gammas[name].data.copy_(file.get_tensor(name))


def exchangeable(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose forward looks its attention up, transformers' only mark of them."""
    found: dict[type, bool] = {}
    for module in network.modules():
        kind = type(module)
        if kind not in found:
            try:
                found[kind] = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(kind.forward)
            except (OSError, TypeError):  # no source: not one of transformers' own
                found[kind] = False
        if found[kind]:
            yield module


def gate(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """Compute the dynamic attention gate, called as transformers calls an attention.

    Args:
        query: (batch, heads, num_queries, head_dim).
        key: like value (batch, key_value_heads, num_keys, head_dim).
        attention_mask: (batch, 1, num_queries, num_keys), bool (True is seen) or additive; None: all is seen.
    """
    scores = _scores(module, query, key, rest) * _gamma(module)
    return _attend(module, torch.sigmoid(_masked(scores, attention_mask)), value, rest)


def gate_norm(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """Compute the gate with rows that sum to 1. sigmoid(x) / sum sigmoid(x) is softmax(log sigmoid(x)), which
    does not underflow where all x are small."""
    scores = _scores(module, query, key, rest) * _gamma(module)
    return _attend(module, torch.softmax(F.logsigmoid(_masked(scores, attention_mask)), dim=-1), value, rest)


def sigmoid_bias(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, Tensor]:
    """Compute sigmoid attention with b = -log n, n counted per query."""
    scores = _scores(module, query, key, rest)
    scores = scores - torch.log(_num_visible(attention_mask, key).to(scores.dtype))
    return _attend(module, torch.sigmoid(_masked(scores, attention_mask)), value, rest)


def _scores(module: nn.Module, query: Tensor, key: Tensor, rest: dict[str, Any]) -> Tensor:
    """Return QK^T x scaling, (batch, heads, num_queries, num_keys), in fp32 or better."""
    asked = [name for name in _REFUSED if rest.get(name) is not None]
    if asked:
        raise ConfigError(
            f"{type(module).__name__} needs {', '.join(asked)}, which gate, gate_norm and sigmoid_bias do "
            "not compute; use model.attn_implementation=eager"
        )
    scaling = rest.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = _grouped(query, key) @ key.transpose(-1, -2)
    scores = scores.view(*query.shape[:-1], key.shape[-2])
    scaled: Tensor = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    return scaled


def _attend(module: nn.Module, weights: Tensor, value: Tensor, rest: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return (batch, num_queries, heads, head_dim), and the weights for output_attentions."""
    weights = F.dropout(weights.to(value.dtype), rest.get("dropout", 0.0), module.training)
    output = _grouped(weights, value) @ value
    return output.view(*weights.shape[:-1], value.shape[-1]).transpose(1, 2).contiguous(), weights


def _grouped(rows: Tensor, shared: Tensor) -> Tensor:
    """Stack the rows of all heads that share a key-value head: no key is repeated in memory. (batch, heads,
    n, m) becomes (batch, key_value_heads, heads / key_value_heads x n, m)."""
    return rows.reshape(rows.shape[0], shared.shape[1], -1, rows.shape[-1])


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return scores that the sigmoid maps to 0 where the mask hides."""
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def _num_visible(mask: Tensor | None, key: Tensor) -> Tensor:
    """Return the keys each query sees, at least 1 (padding sees none), broadcastable to the scores."""
    if mask is None:
        return torch.tensor(key.shape[-2], device=key.device)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.sum(dim=-1, keepdim=True).clamp_min(1)


def _gamma(module: nn.Module) -> Tensor:
    gamma: Tensor | None = getattr(module, GAMMA, None)
    if gamma is None:
        raise ConfigError(
            f"{type(module).__name__} has no {GAMMA}: build the model with train.model.model.build_model, or "
            "call r1hpc.train.model.attention.add_gates and load_gates after transformers' from_pretrained"
        )
    return gamma.to(torch.promote_types(gamma.dtype, torch.float32))


def _explicit_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return transformers' bool mask (batch, 1, num_queries, num_keys), also if plainly causal."""
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


AttentionInterface.register("softmax", sdpa_attention_forward)
AttentionMaskInterface.register("softmax", sdpa_mask)
for _name, _function in (("gate", gate), ("gate_norm", gate_norm), ("sigmoid_bias", sigmoid_bias)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _explicit_mask)
