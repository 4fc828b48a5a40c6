"""A model with integer weights, in the form that vLLM and transformers read (compressed-tensors).

    quantize(Path("runs/r1/grpo/model"), Path("int8"), "int8", texts=None)

int8: weights and activations of 8 bits (W8A8), a scale for each output channel of a weight, and for each
token of what goes in. w4a16: weights of 4 bits, a scale for each group of inputs; activations stay. Rounding
is to the nearest; with `texts` the model is first made easier to round (int8: train/smoothquant.py), or the
roundings make up for each other (w4a16: train/gptq.py). Embedding and output head stay as they are.

Needs the package compressed-tensors (the optional extra `quantize`), as does transformers to read the folder.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import parse_json
from r1hpc.train.attention import OURS
from r1hpc.train.export import open_to_others
from r1hpc.train.gptq import compensate
from r1hpc.train.smoothquant import check_family, smooth

SCHEMES = {"int8": "W8A8", "w4a16": "W4A16"}
"""By the name in --quantize, what compressed-tensors calls it."""
_GROUP_SIZES = (128, 64, 32)
"""Inputs that share a scale at four bits: those that vLLM's kernels have, the fewest bits first."""
_CPU = torch.device("cpu")
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Quantized:
    """How much of a model was made integers."""

    num_quantized: int
    """Of its parameters."""
    num_parameters: int
    group_size: int | None
    """Inputs that share a scale; None: all of an output channel."""


def check_installed() -> None:
    """Raise R1hpcError where compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise R1hpcError("--quantize needs compressed-tensors: pip install 'r1hpc[quantize]'") from None


def check_source(folder: Path, *, calibrated: bool) -> None:
    """Refuse what cannot be quantised, before anything is spent.

    Raises:
        UsageError: no model folder, one that is quantised already, with an attention that only r1hpc
            computes, or of a family that calibration does not know.
    """
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
    if calibrated:
        check_family(str(values.get("model_type")))


def quantize(
    source: Path, folder: Path, scheme: str, texts: Texts | None, device: torch.device = _CPU
) -> Quantized:
    """Write the model of `source` with integer weights into `folder`, a new one, its other files beside it.

    Args:
        scheme: a key of SCHEMES.
        texts: token ids to calibrate on; None: no calibration.
        device: where it is done; it holds the model in fp32.

    Raises:
        UsageError: the model has no layer that can be quantised, layers of no group size that vLLM has, or
            a mixture of experts.
    """
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    network = load_folder(source, device)
    own = AutoConfig.from_pretrained(source, local_files_only=True).dtype or torch.float32
    layers = dict(_layers(network))
    num = sum(parameter.numel() for parameter in network.parameters())
    if not layers or any(parameter.ndim > 2 for parameter in network.parameters()):
        what = "experts in one tensor" if layers else "no linear layers that compressed-tensors knows"
        raise UsageError(f"{source}: a {type(network).__name__} has {what}: it cannot be quantised here")
    if texts is not None and scheme == "int8":
        smooth(network, texts)
    form = _form(scheme, layers)
    config = QuantizationConfig(config_groups={"group_0": form}, ignore=[_head(network)])
    apply_quantization_config(network, config)
    for layer in layers.values():
        _set_scale(layer, own)
    if texts is not None and scheme == "w4a16":
        compensate(network, texts)
    quantized = sum(layer.weight.numel() for layer in layers.values())
    for layer in layers.values():
        compress_module(layer)
    _write(network, own, source, folder)
    _name_scheme(network, folder)
    return Quantized(quantized, num, form.weights.group_size)


def load_folder(folder: Path, device: torch.device = _CPU, dtype: torch.dtype | str = torch.float32) -> Any:
    """The model of a folder, quantised or not; `dtype` auto: in its own precision.

    A quantised one computes as its scheme says, with weights multiplied out at the first forward pass and
    activations rounded at each: what it answers is measured so, not how fast integers are.

    Raises:
        UsageError: tensors are missing, or it cannot be read at all.
    """
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is refused below
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


def _layers(network: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers but the output head, by their names."""
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


def _head(network: PreTrainedModel) -> str:
    head = network.get_output_embeddings()
    return next((name for name, module in network.named_modules() if module is head), "lm_head")


def _form(scheme: str, layers: dict[str, nn.Linear]) -> Any:
    """compressed-tensors' own preset, with a group size that divides the inputs of every layer."""
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
    """The largest weight of each channel or group is the largest integer; in the precision of the file."""
    from compressed_tensors.quantization.utils import calculate_qparams

    form = layer.quantization_scheme.weights
    rows = layer.weight.detach().unflatten(-1, (-1, form.group_size or layer.in_features))
    scale, _ = calculate_qparams(*rows.aminmax(dim=-1), form)
    # Rounded before it divides, so that who reads the file multiplies by the very number.
    layer.weight_scale.data = scale.to(dtype).float()


def _write(network: Any, dtype: torch.dtype, source: Path, folder: Path) -> None:
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)  # smoothing by powers of two left them exact in it
    network.save_pretrained(folder)
    left = {path for form in _WEIGHTS for path in source.glob(form)}
    for path in source.iterdir():
        if path.is_file() and path not in left:
            shutil.copyfile(path, folder / path.name)
    open_to_others(folder)


def _name_scheme(network: Any, folder: Path) -> None:
    """Write into config.json how the weights are to be read."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationStatus

    compressor = ModelCompressor.from_pretrained_model(network)
    compressor.quantization_config.quantization_status = QuantizationStatus.COMPRESSED
    compressor.update_config(str(folder))
