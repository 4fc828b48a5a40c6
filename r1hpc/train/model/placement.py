"""Place a model's weights while it is built: each as it will be trained, as soon as it exists.

Building in fp32 for DeepSpeed puts the whole model in host memory on every rank, four bytes a parameter: 220
GiB for a 7B on eight ranks. Here each tensor is rounded to the training precision, moved to the rank's
device, and under ZeRO 3 divided over the ranks, before the next one is read or drawn. The host holds one full
tensor at a time, beside what its own ranks keep there. The result is bit-identical: random numbers are drawn
in fp32 on the CPU in the same order, and rounding is DeepSpeed's (it leaves buffers alone).
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Placement:
    """Dtype and device of every parameter, and whether each rank keeps only its part."""

    dtype: torch.dtype
    device: torch.device
    sharding: dict[str, Any] | None = None
    """DeepSpeed's config, if parameters are divided as by ZeRO 3: building is then collective."""

    def put(self, parameters: list[nn.Parameter]) -> None:
        """Place those that exist and are not in place yet."""
        for parameter in parameters:
            if not parameter.is_meta and not hasattr(parameter, "ds_id"):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.device, self.dtype)
                if self.sharding is not None:
                    self._convert([parameter])

    def put_rest(self, network: nn.Module) -> None:
        """Place all others, and the buffers, which keep their dtype: rotary frequencies in fp32."""
        self.put(list(network.parameters()))
        for buffer in network.buffers():
            buffer.data = buffer.data.to(self.device)

    @contextmanager
    def each_loaded(self) -> Iterator[None]:
        """Inside, weights read into a model of meta tensors are placed one by one."""

        def put(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None:
                self.put([parameter])

        if self.sharding is not None:
            _ = self._convert  # it makes its own parameter, outside the model
        # Otherwise transformers' threads read ahead, up to the whole model.
        variable = "HF_DEACTIVATE_ASYNC_LOAD"
        before = os.environ.get(variable)
        os.environ[variable] = "1"
        try:
            with register_module_parameter_registration_hook(put):
                yield
        finally:
            if before is None:
                del os.environ[variable]
            else:
                os.environ[variable] = before

    @contextmanager
    def each_made(self) -> Iterator[None]:
        """Inside, the layers of a model from its config are placed one by one."""

        def put(module: nn.Module, name: str, child: nn.Module | None) -> None:
            if child is not None:
                self.put(list(child.parameters(recurse=False)))

        initialise = PreTrainedModel._initialize_weights

        def in_fp32(network: Any, module: nn.Module, *rest: Any) -> None:
            is_done = getattr(module, "_is_hf_initialized", False)
            with nullcontext() if is_done else self._taken_out(module):
                initialise(network, module, *rest)

        PreTrainedModel._initialize_weights = in_fp32
        try:
            with register_module_module_registration_hook(put):
                yield
        finally:
            PreTrainedModel._initialize_weights = initialise

    @contextmanager
    def _taken_out(self, module: nn.Module) -> Iterator[None]:
        """Inside, the parameters of the module and its children are complete, in fp32, on the CPU.
        transformers initialises from the leaves up; some families set a child's weights from its parent."""
        children = [child for child in module.children() if not isinstance(child, PreTrainedModel)]
        owners = [(owner, name) for owner in (module, *children) for name in owner._parameters]
        own = {key: parameter for key in owners if (parameter := key[0]._parameters[key[1]]) is not None}
        with ExitStack() as stack:
            if self.sharding is not None:
                import deepspeed

                divided = [parameter for parameter in own.values() if hasattr(parameter, "ds_id")]
                stack.enter_context(deepspeed.zero.GatheredParameters(divided, modifier_rank=0))
            for (owner, name), parameter in own.items():
                whole = parameter.detach().to("cpu", torch.float32, copy=True)
                owner._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
            try:
                yield
            finally:
                for (owner, name), parameter in own.items():
                    found = owner._parameters[name]
                    assert found is not None, "initialising a module removes no parameter"
                    parameter.data.copy_(found.data)
                    owner._parameters[name] = parameter

    @cached_property
    def _convert(self) -> Any:
        """Return DeepSpeed's own division of a list of parameters."""
        import deepspeed

        # A divided parameter carries it. Not a layer's, which would draw random numbers.
        first = nn.ParameterList([torch.zeros(1, dtype=self.dtype, device=self.device)])
        deepspeed.zero.Init(module=first, config_dict_or_path=self.sharding, dtype=self.dtype)
        return first[0].convert_to_zero_parameters
