"""Read a model's Hugging Face config.json, and count its parameters and FLOPs exactly, without torch.

tests/plan/test_shape.py compares the counts with the transformers models.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import parse_json
from r1hpc.base.names import nearest, printable
from r1hpc.config.paths import how_to_fetch, is_hub_name, local_folder
from r1hpc.config.stages import is_rl
from r1hpc.plan.model.families import ALIASES, FAMILIES, Family, UnknownModelError, is_set

if TYPE_CHECKING:
    from r1hpc.config.schema.run import ModelConfig, RunConfig

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
SHAPE_NAMES = (*_NEEDED, "intermediate_size", "num_key_value_heads", "head_dim", "tie_word_embeddings")
"""The keys that define a model's shape, under Llama's names."""

_MIXED_LAYERS = (
    "hybrid_override_pattern",
    "attn_layer_period",
    "full_attention_interval",
    "layers_block_type",
)
"""Keys by which a config.json without layer_types replaces attention in some layers."""
_MOST_LAYERS = 10_000
"""Layers are counted one by one."""
_MOST = 10**9


@dataclass(frozen=True)
class ModelShape:
    """A causal language model's shape. Counts are of scalars."""

    model_type: str
    num_parameters: int
    """All parameters; a tied head is counted once."""
    num_body_parameters: int
    """Parameters without a separate output head."""
    num_active_parameters: int
    """Parameters that one token meets: for a mixture of experts only the router's choice, else all."""
    num_matmul_parameters: int
    """Active weights that are matrix-multiplied, including the output head (tied or not)."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Inner width of an MLP that is no mixture of experts."""
    vocab_size: int
    max_position_embeddings: int
    saved_values: int
    """Values a layer keeps per token for its backward pass in the model's precision, averaged over layers."""
    saved_fp32_values: int
    """Values it keeps in fp32 whatever the precision: transformers' RMSNorms upcast their input."""
    changes_logits: bool
    """The logits are changed after the output head, so a loss needs them in full."""


@dataclass(frozen=True)
class _Count:
    """Scalars of a part of a model: held in memory, met by one token, multiplied for one token."""

    total: int
    active: int
    matmul: int

    def __add__(self, other: "_Count") -> "_Count":
        return _Count(self.total + other.total, self.active + other.active, self.matmul + other.matmul)

    def __mul__(self, times: int) -> "_Count":
        return _Count(self.total * times, self.active * times, self.matmul * times)


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape of the model that transformers builds from a config.json; raise as `resolve`."""
    family, values = resolve(config)
    heads, head_dim = values["num_attention_heads"], values["head_dim"]
    hidden, vocab, layers = values["hidden_size"], values["vocab_size"], values["num_hidden_layers"]
    body = _attention(family, values) * layers
    for index in range(layers):
        body += _mlp(family, values, index)
    vectors = family.norm_vectors * layers + family.norm_width
    body += _vector(vectors * hidden)
    table = vocab * hidden + (values["max_position_embeddings"] * hidden if family.learned_positions else 0)
    head = _Count(0 if values["tie_word_embeddings"] else vocab * hidden, 0, vocab * hidden)
    return ModelShape(
        model_type=values["model_type"],
        num_parameters=body.total + table + head.total,
        num_body_parameters=body.total + table,
        num_active_parameters=body.active + table + head.total,
        num_matmul_parameters=body.matmul + head.matmul,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=head_dim,
        intermediate_size=values["intermediate_size"],
        vocab_size=vocab,
        max_position_embeddings=values["max_position_embeddings"],
        saved_values=sum(_saved_values(family, values, index) for index in range(layers)) // layers,
        saved_fp32_values=_saved_fp32_values(family, values),
        changes_logits=bool(values.get("final_logit_softcapping")),
    )


def flops_per_token(shape: ModelShape, seq_len: int) -> float:
    """Return model FLOPs per trained token, forward and backward, without recomputation: used for MFU.

    6 per multiplied weight (2 forward, 4 backward) and 12 x layers x heads x head_dim x seq_len for
    attention: PaLM, arXiv 2204.02311, appendix B. That counts the full square of scores, where Megatron-LM
    counts half. Sliding windows count as full attention; embeddings, norms, softmax and biases as nothing.
    """
    attention = 12 * shape.num_layers * shape.num_attention_heads * shape.head_dim * seq_len
    return float(6 * shape.num_matmul_parameters + attention)


def hardware_flops_per_token(shape: ModelShape, seq_len: int, activation_checkpointing: bool) -> float:
    """Return flops_per_token plus the layers' second forward pass of full recomputation: used for HFU.
    Backward is twice a forward, so a second forward adds a third. The output head is not recomputed."""
    model = flops_per_token(shape, seq_len)
    if not activation_checkpointing:
        return model
    return model + (model - 6 * shape.vocab_size * shape.hidden_size) / 3


def check_heads(config: Mapping[str, Any]) -> None:
    """Raise ConfigError if hidden_size is no multiple of the heads (where head_dim follows from it), or these
    are none of the key-value heads. Works on any model_type."""
    heads, hidden, groups = (
        value if isinstance(value := config.get(name), int) else None
        for name in ("num_attention_heads", "hidden_size", "num_key_value_heads")
    )
    if heads and hidden and not config.get("head_dim") and hidden % heads:
        raise ConfigError(
            f"model.config: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    if heads and groups and heads % groups:
        raise ConfigError(
            f"model.config: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config under Llama's names: GPT-2 calls hidden_size n_embd, and so on."""
    aliases = ALIASES.get(str(config.get("model_type")), {})
    return {aliases.get(key, key): value for key, value in config.items()}


def cache_values(config: Mapping[str, Any]) -> int:
    """Return the numbers that a decoder caches per token, by a config.json of any model_type.

    Grouped heads count once for each group. MLA caches one compressed vector a layer and its rotary part
    (DeepSeek-V2, arXiv 2405.04434, section 2.1). Layers that `layer_types` calls anything but attention, or
    linear attention, cache nothing per token; a sliding window counts as full attention. Raise ConfigError if
    a number is missing, or the layers are mixed in another way.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    values = {**(family.defaults if family else {}), **canonical(config)}
    check_heads(values)
    types, mixed = values.get("layer_types"), [key for key in _MIXED_LAYERS if values.get(key)]
    if mixed and not types:
        raise ConfigError(f"config.json mixes layers by {mixed[0]}: what such a model caches is unknown")
    layers = _count(values, "num_hidden_layers")
    if isinstance(types, list):
        layers = sum("attention" in kind and "linear" not in kind for kind in map(str, types))
    if values.get("kv_lora_rank"):
        return layers * (_count(values, "kv_lora_rank") + _count(values, "qk_rope_head_dim"))
    heads = _count(values, "num_attention_heads")
    if family is not None and values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim") is None:
        values["head_dim"] = _count(values, "hidden_size") // heads
    return 2 * layers * _count(values, "num_key_value_heads") * _count(values, "head_dim")


def _count(values: Mapping[str, Any], name: str) -> int:
    _check_count(name, values.get(name))
    return int(values[name])


def dropouts(config: Mapping[str, Any]) -> list[str]:
    """Return the keys by which the language model has dropout; not those of a classifier's head."""
    drops = (key for key, value in config.items() if key.endswith(("pdrop", "dropout")) and value)
    return [key for key in drops if not key.startswith(("summary", "classifier"))]


def resolve(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Return the family and every value it needs: its defaults, the config, and derived values. Raise
    UnknownModelError for an unknown model_type, ConfigError for a shape no model can have."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        hint = nearest(str(model_type), FAMILIES)
        raise UnknownModelError(
            f"the parameters of model_type {printable(str(model_type))!r} cannot be counted{hint}; "
            f"known are: {', '.join(sorted(FAMILIES))}"
        )
    values = {**family.defaults, **canonical(config)}
    for name in _NEEDED:
        _check_count(name, values.get(name))
    check_heads(values)
    heads = values["num_attention_heads"]
    derived = {
        "num_key_value_heads": heads,
        "head_dim": values["hidden_size"] // heads,
        "intermediate_size": 4 * values["hidden_size"],  # only GPT-2 may leave it out
    }
    values |= {name: value for name, value in derived.items() if values.get(name) is None}
    for name in (*derived, *family.expert_keys.values()):
        _check_count(name, values[name])
    if values.get("decoder_sparse_step"):
        _check_count("decoder_sparse_step", values["decoder_sparse_step"])
    if not isinstance(values.get("mlp_only_layers") or [], list):
        raise ConfigError(f"model.config.mlp_only_layers is {values['mlp_only_layers']!r}: it must be a list")
    return family, values


def _check_count(name: str, value: Any) -> None:
    most = _MOST_LAYERS if name == "num_hidden_layers" else _MOST
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        shown = printable(repr(value)[:20])
        raise ConfigError(f"model.config.{name} is {shown}: it must be a whole number from 1 to {most:,}")


def _linear(n_in: int, n_out: int, bias: bool) -> _Count:
    total = n_in * n_out + (n_out if bias else 0)
    return _Count(total, total, n_in * n_out)


def _vector(size: int) -> _Count:
    return _Count(size, size, 0)


def _attention(family: Family, values: Mapping[str, Any]) -> _Count:
    queries, keys = widths(values)
    hidden = values["hidden_size"]
    count = _linear(hidden, queries + 2 * keys, is_set(family.qkv_bias, values))
    count += _linear(queries, hidden, is_set(family.out_bias, values))
    norms = {"": 0, "head": 2 * values["head_dim"], "full": queries + keys}
    return count + _vector(norms[family.qk_norm])


def widths(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return the widths of the queries and of the keys (and values)."""
    head_dim = values["head_dim"]
    return values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim


def _mlp(family: Family, values: Mapping[str, Any], index: int) -> _Count:
    experts = family.experts(values, index)
    hidden = values["hidden_size"]
    bias = is_set(family.mlp_bias_key, values)
    if experts is None:
        return _block(hidden, values["intermediate_size"], family.gated_mlp, bias)
    one = _block(hidden, experts.width, family.gated_mlp, bias)
    count = _linear(hidden, experts.num, bias=False)
    count += _Count(one.total * experts.num, one.active * experts.chosen, one.matmul * experts.chosen)
    if experts.shared_width:
        count += _block(hidden, experts.shared_width, family.gated_mlp, bias) + _linear(hidden, 1, bias=False)
    return count


def _block(hidden: int, width: int, gated: bool, bias: bool) -> _Count:
    return _linear(hidden, width, bias) * (2 if gated else 1) + _linear(width, hidden, bias)


def _saved_values(family: Family, values: Mapping[str, Any], index: int) -> int:
    """Count Q, K, V, fused attention's output, the inputs of QKV and MLP, the norms, and the MLP's inside."""
    queries, keys = widths(values)
    hidden = values["hidden_size"]
    saved = 2 * hidden + 2 * queries + 2 * keys + family.num_norms * hidden
    saved += (queries + keys) * (bool(family.qk_norm) + family.fused_rotary_qkv)
    experts = family.experts(values, index)
    if experts is None:
        return int(saved + family.mlp_tensors_saved(values) * values["intermediate_size"])
    # Each chosen expert has a copy of its input and its output, weighted afterwards.
    inside = family.mlp_tensors_saved(values) * (experts.chosen * experts.width + experts.shared_width)
    return int(saved + inside + 2 * experts.chosen * hidden)


def _saved_fp32_values(family: Family, values: Mapping[str, Any]) -> int:
    """Count the upcast inputs of RMSNorms, and one statistic for each norm and head."""
    queries, keys = widths(values)
    upcast = 0 if family.norm_width == 2 else family.num_norms * values["hidden_size"]
    if family.qk_norm:
        upcast += queries + keys
    return int(upcast + family.num_norms + values["num_attention_heads"])


def load_model_config(
    config: "RunConfig", vocab_size: int | None, expected: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return model.path/config.json with model.config over it, and the dataset's vocabulary if none is given.

    `expected` replaces the config.json of a folder that another run has yet to write. Raise ConfigError for
    no model at all, no readable config.json, or a vocabulary smaller than the dataset's.
    """
    model = config.model
    merged = {**_of_folder(model.path, expected, "model.path"), **model.config}
    if "model_type" not in merged:
        raise ConfigError("no model: give model.path=DIR, or include one such as model/tiny in the job file")
    own = merged.get("vocab_size")
    if own is None:
        return merged if vocab_size is None else {**merged, "vocab_size": vocab_size}
    if not isinstance(own, int) or own < 1:
        raise ConfigError(f"model.config.vocab_size is {own!r}: it must be a whole number above 0")
    if vocab_size is not None and own < vocab_size:
        is_loaded = model.path is not None and not model.from_scratch
        other = "enlarge the model's embedding" if is_loaded else "raise model.config.vocab_size"
        raise ConfigError(
            f"the model's vocab_size is {own}, but the tokenizer has {vocab_size} tokens: use the model's "
            f"own tokenizer, for the dataset too, or {other}"
        )
    return merged


def load_teacher_config(
    config: "RunConfig", expected: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the config.json of rl.teacher; None: the run has no teacher. `expected` is as for
    `load_model_config`. Raise ConfigError for no readable config.json, or one without model_type."""
    if not is_rl(config.stage) or config.rl.teacher is None:
        return None
    found = _of_folder(config.rl.teacher, expected, "rl.teacher")
    if "model_type" not in found:
        raise ConfigError(f"the config.json of rl.teacher {config.rl.teacher} names no model_type")
    return found


def teacher_of(config: "RunConfig", hf_config: Mapping[str, Any]) -> "ModelConfig":
    """Return rl.teacher as a model to build, with the attention in its config.json, else the student's."""
    from r1hpc.config.schema.run import OWN_ATTENTIONS, ModelConfig  # estimates by flags need no settings

    student, trained = config.model.attn_implementation, hf_config.get("attn_implementation")
    if trained not in OWN_ATTENTIONS:
        trained = "sdpa" if student in OWN_ATTENTIONS else student
    return ModelConfig(path=config.rl.teacher, attn_implementation=trained)


def check_model_type(model_type: Any) -> None:
    """Raise ConfigError for a model_type that the installed transformers has no causal language model for.
    Its table is read as text, since importing it takes seconds. If there is none, the ranks find out."""
    found = importlib.util.find_spec("transformers")
    file = Path(found.origin or "").parent / "models" / "auto" / "modeling_auto.py" if found else None
    if file is None or not file.is_file():
        return
    _, _, table = file.read_text(encoding="utf-8").partition("\nMODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")
    known = re.findall(r'^ +\("([^"]+)",', table.partition("\n)")[0], re.MULTILINE)
    if known and model_type not in known:
        raise ConfigError(
            f"model_type is {printable(str(model_type))!r}, which the installed transformers has no causal "
            f"language model for{nearest(str(model_type), known)}; there are {len(known)}, as qwen2"
        )


def _of_folder(path: str | None, expected: Mapping[str, Any] | None, setting: str) -> dict[str, Any]:
    if path is None:
        return {}
    folder = Path(local_folder(path))
    file = folder / "config.json"
    if expected is not None and not file.is_file():
        return dict(expected)
    if is_hub_name(str(folder)):
        raise ConfigError(f"{setting} {path}: {how_to_fetch(path)}")
    if folder.suffix == ".gguf" or (not file.is_file() and (ggufs := sorted(folder.glob("*.gguf")))):
        gguf = folder if folder.suffix == ".gguf" else ggufs[0]
        raise ConfigError(
            f"{setting} {path} holds a model in GGUF: make a Hugging Face folder of it first, by "
            f"`python -m r1hpc.export {gguf} --out DIR`, and give {setting}=DIR"
        )
    if not folder.is_dir():
        raise ConfigError(f"{setting} {path} is not a folder: give a local folder with config.json")
    if not file.is_file():
        raise ConfigError(f"{file} is missing: {setting} must be a folder in Hugging Face format")
    return read_config(file)


def read_config(file: Path) -> dict[str, Any]:
    """Return the object in a model's config.json; raise ConfigError if it holds none."""
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold one JSON object: a model's config.json")
    return content
