"""Quantise a model's weights to integers, in the format of vLLM and transformers (compressed-tensors).

int8: weights and activations of 8 bits (W8A8), with a scale per output channel of a weight and per input
token. w4a16: weights of 4 bits, with a scale per group of inputs; activations stay. Values round to the
nearest. With `texts` an int8 model is first made easier to round (SmoothQuant). Embedding and output head
stay as they are. Needs the package compressed-tensors (the optional extra `quantize`), as does transformers
to read the folder.

`smooth` (SmoothQuant, Xiao et al., arXiv 2211.10438) moves outliers from the activations into the weights. A
few input channels of a layer are tens of times larger than the rest, but a token has one scale for all.
Channel j is divided by s_j before the layer, in the norm or layer that makes it, and the layer's weights for
it are multiplied: s_j = max|X_j|^0.5 / max|W_j|^0.5 (eq. 4), the maxima over calibration texts. Here s_j is
the nearest power of two, so that the output is bit-identical in any floating-point precision. The step from
up_proj to down_proj is smoothed too, as AWQ does (2306.00978).
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import parse_json
from r1hpc.train.model.attention import OURS
from r1hpc.train.model.export import open_to_others

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose norms multiply by their weight, and whose layers have these names:"""
_PAIRS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
"""The module that makes a channel and those that read it, in a decoder layer."""
_LEAST = 1e-5
"""Smallest maximum: a channel that is always zero needs no scale."""
SCHEMES = {"int8": "W8A8", "w4a16": "W4A16"}
"""Names in --quantize, and compressed-tensors' names."""
_GROUP_SIZES = (128, 64, 32)
"""Inputs that share a scale at four bits: the sizes of vLLM's kernels, the fewest bits first."""
_CPU = torch.device("cpu")
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Quantized:
    num_quantized: int
    num_parameters: int
    group_size: int | None
    """Inputs that share a scale; None: the complete output channel."""


def check_installed() -> None:
    """Raise R1hpcError if compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise R1hpcError("--quantize needs compressed-tensors: pip install 'r1hpc[quantize]'") from None


def check_source(folder: Path, *, calibrated: bool) -> None:
    """Refuse a model that cannot be quantised, before GPU-hours are spent."""
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder} is no model folder: it has no config.json")
    values = parse_json(file.read_bytes())
    if values.get("quantization_config"):
        raise UsageError(
            f"the weights in {folder} are quantised already: take the folder they were made from"
        )
    if values.get("attn_implementation") in OURS:
        raise UsageError(
            f"{folder} was trained with attn_implementation={values['attn_implementation']}, which neither "
            "vLLM nor transformers computes: it cannot be served, quantised or not"
        )
    if calibrated and values.get("model_type") not in _FAMILIES:
        raise UsageError(
            f"--calibrate knows the layers of {', '.join(_FAMILIES)}; this is {values.get('model_type')}: "
            "export it without"
        )


def quantize(
    source: Path,
    folder: Path,
    scheme: str,
    texts: Texts | None,
    device: torch.device = _CPU,
    compensate: Callable[[Any, Texts], None] | None = None,
) -> Quantized:
    """Write the model of `source` with integer weights into the new `folder`, with its other files.

    Args:
        scheme: a key of SCHEMES.
        texts: token ids to calibrate on; None: no calibration.
        device: computes, and holds the model in fp32.
        compensate: changes the weights in place, between setting the scales and rounding.
    """
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    network = load_folder(source, device)
    own = AutoConfig.from_pretrained(source, local_files_only=True).dtype or torch.float32
    head = network.get_output_embeddings()
    named = dict(network.named_modules())
    layers = {n: m for n, m in named.items() if isinstance(m, nn.Linear) and m is not head}
    num = sum(parameter.numel() for parameter in network.parameters())
    if not layers or any(parameter.ndim > 2 for parameter in network.parameters()):
        what = "experts in one tensor" if layers else "no linear layers that compressed-tensors knows"
        raise UsageError(f"{source}: a {type(network).__name__} has {what}: it cannot be quantised here")
    if texts is not None and scheme == "int8":
        smooth(network, texts)
    form = _form(scheme, layers)
    ignored = next((name for name, module in named.items() if module is head), "lm_head")
    config = QuantizationConfig(config_groups={"group_0": form}, ignore=[ignored])
    apply_quantization_config(network, config)
    for layer in layers.values():
        _set_scale(layer, own)
    if texts is not None and compensate is not None:
        compensate(network, texts)
    quantized = sum(layer.weight.numel() for layer in layers.values())
    for layer in layers.values():
        compress_module(layer)
    _write(network, own, source, folder)
    return Quantized(quantized, num, form.weights.group_size)


def load_folder(folder: Path, device: torch.device = _CPU, dtype: torch.dtype | str = torch.float32) -> Any:
    """Return the model of a folder, quantised or not; `dtype` auto: in its own precision.

    A quantised one computes as its scheme says: weights are multiplied out at the first forward pass,
    activations rounded at each. So its answers are measured, not the speed of integers.
    """
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # missing tensors are refused below
    logging.disable_progress_bar()
    try:
        network, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"transformers cannot read {folder}: {error}") from None
    finally:
        logging.set_verbosity(said)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UsageError(f"{folder} lacks {len(missing)} tensors, among them {missing[0]}: copy it again")
    return network.to(device).eval()


def _form(scheme: str, layers: dict[str, nn.Linear]) -> Any:
    """Return compressed-tensors' preset, with a group size that divides the inputs of every layer."""
    from compressed_tensors.quantization import preset_name_to_scheme

    form = preset_name_to_scheme(SCHEMES[scheme], ["Linear"])
    if form.weights.group_size is None:
        return form
    widths = {layer.in_features for layer in layers.values()}
    fitting = [size for size in _GROUP_SIZES if all(width % size == 0 for width in widths)]
    if not fitting:
        raise UsageError(
            f"--quantize {scheme} gives {', '.join(map(str, _GROUP_SIZES))} inputs a scale, and none of "
            f"these divides the widths of all layers ({', '.join(map(str, sorted(widths)))}): take int8"
        )
    form.weights.group_size = fitting[0]
    return form


def _set_scale(layer: Any, dtype: torch.dtype) -> None:
    """Scale the largest weight of each channel or group to the largest integer, in the file's precision."""
    from compressed_tensors.quantization.utils import calculate_qparams

    form = layer.quantization_scheme.weights
    rows = layer.weight.detach().unflatten(-1, (-1, form.group_size or layer.in_features))
    scale, _ = calculate_qparams(*rows.aminmax(dim=-1), form)
    # Round before dividing, so that a reader of the file multiplies by the same number.
    layer.weight_scale.data = scale.to(dtype).float()


def _write(network: Any, dtype: torch.dtype, source: Path, folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationStatus

    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)  # exact: smoothing used powers of two
    network.save_pretrained(folder)
    left = {path for form in _WEIGHTS for path in source.glob(form)}
    for path in source.iterdir():
        if path.is_file() and path not in left:
            shutil.copyfile(path, folder / path.name)
    open_to_others(folder)
    compressor = ModelCompressor.from_pretrained_model(network)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    compressor.update_config(str(folder))


@torch.no_grad()
def smooth(network: Any, texts: Sequence[Sequence[int]]) -> None:
    """Move outliers into the weights, in place; the network's output is unchanged."""
    pairs = [
        (layer.get_submodule(maker), [layer.get_submodule(reader) for reader in readers])
        for layer in network.model.layers
        for maker, readers in _PAIRS
    ]
    largest = _largest_inputs(network, [readers[0] for _, readers in pairs], texts)
    for maker, readers in pairs:
        weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
        inputs = largest[readers[0]]
        ratios = inputs.clamp_min(_LEAST).log2() - weights.clamp_min(_LEAST).log2()
        factors = torch.exp2((ratios / 2).round())
        maker.weight.div_(factors if maker.weight.ndim == 1 else factors[:, None])
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(factors)
        for reader in readers:
            reader.weight.mul_(factors)


def _largest_inputs(
    network: Any, modules: Sequence[nn.Module], texts: Sequence[Sequence[int]]
) -> dict[nn.Module, torch.Tensor]:
    """Return for each module the largest magnitude of every input channel over all texts."""
    largest: dict[nn.Module, torch.Tensor] = {}

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen = inputs[0].abs().flatten(0, -2).amax(0)
        largest[module] = torch.maximum(largest[module], seen) if module in largest else seen

    hooks = [module.register_forward_pre_hook(look) for module in modules]
    try:
        for text in texts:
            network(input_ids=torch.tensor([list(text)], device=network.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
