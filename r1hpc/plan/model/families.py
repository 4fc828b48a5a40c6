"""Describe the differences between the model families whose parameters r1hpc can count.

Defaults are those of the family's configuration class in transformers; a config.json may leave them out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from r1hpc.base.errors import ConfigError


class UnknownModelError(ConfigError):
    """A model_type whose parameters r1hpc cannot count. The model may still train."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer: how many, how many per token, their MLP width."""

    num: int
    chosen: int
    width: int
    shared_width: int = 0
    """Width of an expert used by every token, behind a separate gate; 0: none."""


@dataclass(frozen=True)
class Family:
    """A family's differences from Llama: two RMSNorms per layer, a gated MLP, no biases, rotary positions."""

    defaults: Mapping[str, Any]
    norm_vectors: int = 2
    """Vectors of hidden_size in the norms of a layer."""
    norm_width: int = 1
    """Vectors of hidden_size in one norm: 2 for LayerNorm (weight and bias)."""
    gated_mlp: bool = True
    learned_positions: bool = False
    fused_rotary_qkv: bool = False
    """Q, K and V are one projection, and Q and K are rotated: V, a view of it, keeps all of it alive."""
    qkv_bias: str | bool = False
    """Always, never, or set by this key of the config."""
    out_bias: str | bool = False
    mlp_bias_key: str | bool = False
    qk_norm: str = ""
    """`head`: one vector of head_dim each for queries and keys; `full`: over all their heads."""
    expert_keys: Mapping[str, str] = field(default_factory=dict)
    """Names of Experts' fields in the config; empty: no experts."""

    @property
    def num_norms(self) -> int:
        """Return the norms of a layer over hidden_size."""
        return self.norm_vectors // self.norm_width

    def mlp_tensors_saved(self, values: Mapping[str, Any]) -> int:
        """Return the tensors as wide as the MLP that a layer keeps for its backward pass.

        Gated: gate, up, activation, product. Plain: the activation's input and output. transformers builds
        gelu_new from elementary operations, and each keeps something.
        """
        if self.gated_mlp:
            return 4
        return 5 if values.get("activation_function") == "gelu_new" else 2

    def experts(self, values: Mapping[str, Any], index: int) -> Experts | None:
        """Return the experts of layer `index` (from 0), or None for an ordinary MLP."""
        if not self.expert_keys or index in (values.get("mlp_only_layers") or ()):
            return None
        if (index + 1) % (values.get("decoder_sparse_step") or 1):
            return None
        return Experts(**{name: values[key] for name, key in self.expert_keys.items()})


def is_set(setting: str | bool, values: Mapping[str, Any]) -> bool:
    """Return a family's setting, which may be a key of the config."""
    return bool(values.get(setting)) if isinstance(setting, str) else setting


def _defaults(
    vocab_size: int,
    hidden: int,
    width: int | None,
    layers: int,
    heads: int,
    positions: int,
    key_value_heads: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": False,
    } | more


_LLAMA = Family(
    _defaults(32000, 4096, 11008, 32, 32, 2048), qkv_bias="attention_bias", out_bias="attention_bias"
)
_LAYER_NORM = Family({}, norm_vectors=4, norm_width=2, gated_mlp=False, mlp_bias_key=True)
_ROUTED = {"num": "num_experts", "chosen": "num_experts_per_tok", "width": "moe_intermediate_size"}
_GEMMA: dict[str, Any] = {"head_dim": 256, "tie_word_embeddings": True}

FAMILIES: dict[str, Family] = {
    "llama": replace(_LLAMA, mlp_bias_key="mlp_bias"),
    "mistral": Family(_defaults(32000, 4096, 14336, 32, 32, 131072, 8)),
    "qwen2": Family(_defaults(151936, 4096, 22016, 32, 32, 32768, 32), qkv_bias=True),
    "qwen3": replace(
        _LLAMA, defaults=_defaults(151936, 4096, 22016, 32, 32, 32768, 32, head_dim=128), qk_norm="head"
    ),
    "gemma": replace(_LLAMA, defaults=_defaults(256000, 3072, 24576, 28, 16, 8192, 16, **_GEMMA)),
    "gemma2": replace(
        _LLAMA,
        defaults=_defaults(256000, 2304, 9216, 26, 8, 8192, 4, final_logit_softcapping=30.0, **_GEMMA),
        norm_vectors=4,
    ),
    "phi3": Family(_defaults(32064, 3072, 8192, 32, 32, 4096), fused_rotary_qkv=True),
    "gpt2": replace(
        _LAYER_NORM,
        defaults=_defaults(
            50257, 768, None, 12, 12, 1024, tie_word_embeddings=True, activation_function="gelu_new"
        ),
        learned_positions=True,
        qkv_bias=True,
        out_bias=True,
    ),
    "gpt_neox": replace(
        _LAYER_NORM,
        defaults=_defaults(50432, 6144, 24576, 44, 64, 2048, attention_bias=True),
        fused_rotary_qkv=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
    ),
    "mixtral": Family(
        _defaults(32000, 4096, 14336, 32, 32, 131072, 8, num_local_experts=8, num_experts_per_tok=2),
        expert_keys=_ROUTED | {"num": "num_local_experts", "width": "intermediate_size"},
    ),
    "qwen2_moe": Family(
        _defaults(151936, 2048, 5632, 24, 16, 32768, 16, num_experts=60, num_experts_per_tok=4)
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "qkv_bias": True},
        qkv_bias="qkv_bias",
        expert_keys=_ROUTED | {"shared_width": "shared_expert_intermediate_size"},
    ),
    "qwen3_moe": replace(
        _LLAMA,
        defaults=_defaults(151936, 2048, 6144, 24, 32, 32768, 4, num_experts=128, num_experts_per_tok=8)
        | {"moe_intermediate_size": 768},
        qk_norm="head",
        expert_keys=_ROUTED,
    ),
    "olmo2": replace(_LLAMA, defaults=_defaults(50304, 4096, 11008, 32, 32, 2048), qk_norm="full"),
}

ALIASES: dict[str, dict[str, str]] = {
    "gpt2": {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""Other names in the family's config.json files, and the name used here."""
