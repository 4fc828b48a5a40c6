"""Low-rank adapters (Hu et al., arXiv 2106.09685) through peft: the model stays, small matrices are trained.

network = wrap_lora(build_model(...), config.model)     # model.lora_rank=8
with reference(network): ...                            # the model as it was before, for the KL term

DeepSpeed trains and saves the wrapped model like any other; train/export.py merges the adapters into the
weights. Everything else is frozen, also gate_gamma. peft is the optional extra `lora`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from r1hpc.base.errors import ConfigError, R1hpcError
from r1hpc.config.schema import ModelConfig


def wrap_lora(network: nn.Module, model: ModelConfig) -> Any:
    """The network with adapters of rank `model.lora_rank` on `model.lora_targets`; only they are trainable.

    A wrapped network computes what the network computed: the second matrix of each adapter starts at zero.
    The first is drawn from torch's stream: seed it alike on all ranks (build_model just did).

    Raises:
        R1hpcError: peft is not installed.
        ConfigError: lora_rank is 0, or no layer has a name of lora_targets.
    """
    if model.lora_rank < 1:
        raise ConfigError("model.lora_rank is 0: give the rank of the adapters, for example 8")
    peft = _import_peft()
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


@contextmanager
def reference(network: Any) -> Iterator[None]:
    """Inside, the wrapped network computes what it did before any training."""
    with network.disable_adapter():
        yield


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise R1hpcError("model.lora_rank needs peft: pip install 'r1hpc[lora]'") from None
    return peft
