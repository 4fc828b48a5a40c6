"""Make a Hugging Face folder of a checkpoint or of a GGUF file, in one process, for r1hpc.export.

A checkpoint needs neither GPU nor the run's ranks. The weights are those that a run ending at this step would
leave in its `model/`: in its training precision, with adapters merged and without a critic.

GGUF (llama.cpp's format) is read if transformers reads its architecture. It needs the package gguf (the
optional extra of that name). Quantised weights are multiplied out and kept in bf16. What quantisation lost
stays lost: the folder is for training, not a benchmark of the original.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.checkpoint.store import Checkpoint
from r1hpc.config.schema.run import RunConfig
from r1hpc.plan.model.shape import load_model_config
from r1hpc.plan.model.weights import first_of
from r1hpc.tasks.text.tokenizer import TokenizerFiles
from r1hpc.train.checkpoint.deepspeed_io import load_file
from r1hpc.train.model.export import export_model, open_to_others
from r1hpc.train.model.low_precision import holds_nf4, load_adapters
from r1hpc.train.model.placement import Placement
from r1hpc.train.parallel.distributed import Group
from r1hpc.train.parallel.errors import ResumeError
from r1hpc.train.rollout.policy import DTYPES, build_policy

_TAG = "deepspeed"
_CRITIC = "value_head.weight"
"""A weight that only PPO's module has, which holds the policy beside its critic."""


def export_checkpoint(
    config: RunConfig,
    checkpoint: Checkpoint,
    folder: Path,
    tokenizer: TokenizerFiles | None,
    vocab_size: int | None = None,
) -> None:
    """Write the model of a verified checkpoint of a run into `folder`, as export_model does.

    `vocab_size` is the dataset's, for a model whose config leaves it out. Raise ResumeError if the weights
    are not those of the run's model.
    """
    if checkpoint.manifest.meta["zero_stage"] == 3:  # each rank holds a part
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.path), _TAG)
    else:
        weights = load_file(checkpoint.path / _TAG / "mp_rank_00_model_states.pt")["module"]
    if _CRITIC in weights:
        weights = {k.removeprefix("policy."): v for k, v in weights.items() if k.startswith("policy.")}
    place = Placement(DTYPES[config.train.precision], torch.device("cpu"))
    network = build_policy(config, load_model_config(config, vocab_size), place)
    try:
        if holds_nf4(network):
            load_adapters(weights, network)
        else:
            network.load_state_dict(weights)
    except (RuntimeError, ResumeError) as error:
        raise ResumeError(f"{checkpoint.path} does not hold the run's model: {error}") from None
    export_model(network, Group(0, 0, 1, torch.device("cpu")), folder, tokenizer)


_DROPPED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""llama.cpp tensors that scale the rotary positions; transformers 5 reads none of them."""
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of GGUF within which a text may not be cut."""


def convert_gguf(file: Path, folder: Path) -> None:
    """Write config.json, safetensors in bf16, the tokenizer and its chat template into `folder`."""
    try:
        import gguf  # transformers needs it too, and its error is long
    except ImportError:
        raise R1hpcError("reading GGUF needs the package gguf: pip install 'r1hpc[gguf]'") from None
    try:
        reader = gguf.GGUFReader(file)
        _refuse_what_would_be_dropped(file, reader)
        packed, read = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except UsageError:
        raise
    # Any error of its reader: a torn file, an unknown architecture or tokenizer.
    except Exception as error:
        raise UsageError(f"transformers cannot read {file}: {error}") from None
    if read["missing_keys"]:
        raise UsageError(
            f"{file} has no {first_of(sorted(read['missing_keys']))}, which would be random numbers: take "
            "another file of the model"
        )
    _refuse_other_tokens(file, reader, tokenizer, packed.config.vocab_size)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with it transformers refuses to save
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.load_state_dict(packed.state_dict())
    network.generation_config = packed.generation_config
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    open_to_others(folder)


def _refuse_what_would_be_dropped(file: Path, reader: Any) -> None:
    """Refuse tensors that transformers would silently leave out, which would change the model."""
    parts = _value(reader, "split.count")
    if parts is not None and parts > 1:
        raise UsageError(
            f"{file} is one of {parts} parts of a model: join them by llama.cpp's `llama-gguf-split --merge`"
        )
    scaled = [tensor.name for tensor in reader.tensors if tensor.name in _DROPPED]
    kinds = [_value(reader, key) for key in reader.fields if key.endswith(".rope.scaling.type")]
    scaled += [f"rope scaling {kind}" for kind in kinds if kind != "none"]
    if scaled:
        raise UsageError(
            f"{file} scales its rotary positions ({scaled[0]}), which transformers does not read from GGUF: "
            "take the model's own folder of safetensors"
        )


def _refuse_other_tokens(file: Path, reader: Any, tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that has more tokens than the model, or lacks those that mark its turns."""
    texts, types = (_value(reader, f"tokenizer.ggml.{name}") or [] for name in ("tokens", "token_type"))
    kinds = zip(texts, types, strict=False)  # a file may leave out the types
    marks = [(i, text) for i, (text, kind) in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)]
    # Gemma spells runs of blanks with another sign.
    lost = [text for i, text in marks if text.strip() and tokenizer.convert_tokens_to_ids(text) != i]
    if len(tokenizer) > vocab_size or lost:
        what = f"has {len(tokenizer)} tokens for the model's {vocab_size}"
        if lost:
            what = f"loses {first_of(lost)}"
        raise UsageError(
            f"the tokenizer that transformers makes of {file} {what}: take the model's own folder, with its "
            "tokenizer.json"
        )


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
