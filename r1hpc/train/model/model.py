"""Build any Hugging Face causal language model from a config or local weights, and add adapters.

Low-rank adapters (Hu et al., arXiv 2106.09685) use peft, the optional extra `lora`: the model is frozen, and
small matrices beside its layers are trained. DeepSpeed trains and saves the wrapped model like any other;
train/model/export.py merges the adapters into the weights.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.config.schema.run import ModelConfig
from r1hpc.plan.model.weights import check_weights, first_of, refuse_misshapen
from r1hpc.train.model.attention import GAMMA, OURS, add_gates, check_implementation, load_gates
from r1hpc.train.model.low_precision import finish, four_bits
from r1hpc.train.model.placement import Placement


def build_model(
    model: ModelConfig, hf_config: dict[str, Any], seed: int, place: Placement | None = None
) -> PreTrainedModel:
    """Return the model, the same on every rank for the same seed.

    Dropout follows `hf_config`, a config.json with its vocabulary (plan.model.load_model_config), else
    transformers' default (GPT-2's is 0.1). `place`: dtype, device and division of its parameters; None:
    complete, in fp32, on the CPU. Raise ConfigError for an unknown model_type or attention, or weights that
    are missing, of another shape, or trained with another attention.
    """
    check_implementation(model.attn_implementation)
    trained = hf_config.get("attn_implementation")  # named by an export (train/model/export.py)
    if trained in OURS and trained != model.attn_implementation and not model.from_scratch:
        raise ConfigError(
            f"the weights in {model.path} were trained with attn_implementation={trained}, the run has "
            f"model.attn_implementation={model.attn_implementation}: set it to {trained}"
        )
    torch.manual_seed(seed)
    values = {key: value for key, value in hf_config.items() if key != "attn_implementation"}
    model_type = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ConfigError(f"model_type {json.dumps(model_type)}: {str(error).splitlines()[0]}") from None
    config.use_cache = False
    if model.path is not None and not model.from_scratch:
        check_weights(model)
        network = _from_weights(Path(model.path), config, model, place)
    else:
        with place.each_made() if place else nullcontext(), _refused(model.attn_implementation):
            network = AutoModelForCausalLM.from_config(
                config, attn_implementation=model.attn_implementation, dtype=torch.float32
            )
        add_gates(network, model.attn_implementation)
    if place:
        place.put_rest(network)
    if model.activation_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    network.train()
    return network


def cast_parameters(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the parameters as DeepSpeed does. Buffers keep their dtype: rotary frequencies stay in fp32.

    `network.to(dtype)` rounds those too, and the model computes something else (measured: tiny Qwen2, bf16).
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)


def wrap_lora(network: nn.Module, model: ModelConfig) -> Any:
    """Return the network with adapters of rank `model.lora_rank` on `model.lora_targets`; only they train.

    Everything else is frozen, also gate_gamma. A wrapped network computes what the network computed: the
    second matrix of each adapter starts at zero. The first is drawn from torch's stream: seed it alike on all
    ranks (build_model just did). Raise ConfigError if peft is not installed, lora_rank is 0, or no layer has
    a name of lora_targets.
    """
    if model.lora_rank < 1:
        raise ConfigError("model.lora_rank is 0: give the rank of the adapters, for example 8")
    _refuse_tied_targets(network, model)
    try:
        import peft
    except ImportError:
        raise ConfigError("model.lora_rank needs peft: pip install 'r1hpc[lora]'") from None
    config = peft.LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_dropout=0.0,
        # peft's shorthand leaves the output head out, and counts GPT-2's Conv1D.
        target_modules=list(model.lora_targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),  # GPT-2's
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(network, config)
    except ValueError as error:
        raise ConfigError(f"model.lora_targets={model.lora_targets}: {error}") from None


def _refuse_tied_targets(network: Any, model: ModelConfig) -> None:
    """Refuse an adapter on one of two modules that share a tensor: the export would merge it into both."""
    ends = network.get_input_embeddings(), network.get_output_embeddings()
    if None in ends or ends[0].weight is not ends[1].weight:
        return
    names = [name for name, module in network.named_modules() if any(module is end for end in ends)]
    hit = [target for target in model.lora_targets if any(f".{n}".endswith(f".{target}") for n in names)]
    if hit:
        raise ConfigError(
            f"model.lora_targets names {', '.join(hit)}, and this model's embedding and output head share "
            "their weights: leave it out, since an export cannot hold an adapter on one of them"
        )


def _from_weights(folder: Path, config: Any, model: ModelConfig, place: Placement | None) -> PreTrainedModel:
    said, implementation, loading = logging.get_verbosity(), model.attn_implementation, {}
    if model.base_quantization == "nf4":
        place = place or Placement(torch.float32, torch.device("cpu"))
        loading = four_bits(place)
    logging.set_verbosity_error()  # what transformers only warns of is refused below
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # hundreds of lines in a rank's log
    try:
        with place.each_loaded() if place else nullcontext(), _refused(implementation):
            network, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                attn_implementation=implementation,
                dtype=torch.float32,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **loading,
            )
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(f"the weights in {folder} cannot be loaded: {error}") from None
    finally:
        logging.set_verbosity(said)
    _check_loaded(loaded, f"the weights in {folder}", type(network).__name__)
    add_gates(network, implementation)
    load_gates(network, folder)
    if place and loading:
        finish(network, place.dtype)
    return network


@contextmanager
def _refused(implementation: str) -> Iterator[None]:
    """Turn a missing attention package, or an attention the model does not have, into a ConfigError."""
    try:
        yield
    except R1hpcError:
        raise
    except (ImportError, ValueError) as error:
        why = (str(error).strip().splitlines() or [""])[0]
        if implementation == "eager" or "ttention" not in why:
            raise
        other = "eager" if implementation == "sdpa" else "sdpa"
        raise ConfigError(
            f"model.attn_implementation={implementation}: {why} Take model.attn_implementation={other}"
        ) from None


def _check_loaded(loaded: dict[str, Any], weights: str, model_class: str) -> None:
    """Refuse weights that transformers would initialise at random, and name those it leaves out. Tied heads
    and buffers that the model computes are in neither list: transformers knows them."""
    refuse_misshapen(weights, loaded["mismatched_keys"])
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ConfigError(
            f"{weights} lack {len(missing)} tensors of a {model_class}: {first_of(missing)}. Copy the full "
            "model there, or set model.from_scratch=true for random weights"
        )
    unexpected = sorted(name for name in loaded["unexpected_keys"] if not name.endswith(f".{GAMMA}"))
    if unexpected:
        print(
            f"note: {weights} hold {len(unexpected)} tensors that a {model_class} of this config does not "
            f"have: {first_of(unexpected)}; they are ignored, and not exported",
            flush=True,
        )
