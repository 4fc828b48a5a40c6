"""Look up GPUs by name: peak arithmetic, memory and bandwidth, for MFU, the memory plan and the estimate.

Peaks are dense bf16 (fp16 if the card has no bf16), without sparsity. Sources: the maker's data sheet of each
product. An unlisted card gives no MFU rather than a guess.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable

if TYPE_CHECKING:  # estimate --help loads this module
    from r1hpc.config.schema.run import RunConfig

FLAGS_INSTEAD = "give --peak-tflops (dense bf16) and --gpu-memory-gib instead, or"
"""The estimator's flags for an unlisted card."""
_GH200_HOST_GB = 480
"""NVML calls that card `NVIDIA GH200 480GB`, by the memory of its processor."""
_SLICE = re.compile(r"(?<![a-z0-9])(MIG|\d+g\.\d+gb)(?![a-z0-9])", re.IGNORECASE)
"""A slice of a card (MIG), as named by NVML or by Slurm's AutoDetect: nvidia_a100_80gb_pcie_3g.40gb. It has
only a part of the speed and memory listed here."""
_FORMS = {"SXM": "SXM", "SXM2": "SXM", "SXM4": "SXM", "SXM5": "SXM", "PCIE": "PCIE", "NVL": "NVL"}


class UnknownGpuError(UsageError):
    """A GPU name that is not in the table."""


@dataclass(frozen=True)
class Gpu:
    """One product. Memory is the data sheet's GB; a driver leaves a little less."""

    name: str
    peak_tflops: float
    memory_gib: float
    bandwidth_tb_s: float
    has_bf16: bool = True
    has_fp8: bool = False
    has_fp4: bool = False

    @property
    def peak_flops(self) -> float:
        return self.peak_tflops * 1e12

    @property
    def family(self) -> str:
        """Return the first word of the name: A100, H100 ..."""
        return self.name.split("-")[0]

    @property
    def generation(self) -> str:
        """Return Ampere, Hopper, Ada, Blackwell, AMD, or Volta (Turing too)."""
        if self.family.startswith("MI"):
            return "AMD"
        if self.has_fp4:
            return "Blackwell"
        if self.has_fp8:
            return "Ada" if self.family.startswith("L") else "Hopper"
        return "Ampere" if self.has_bf16 else "Volta"


# The first one of a family is used for the bare family name.
GPUS: tuple[Gpu, ...] = (
    Gpu("A100-SXM4-80GB", 312, 80, 2.039),
    Gpu("A100-SXM4-40GB", 312, 40, 1.555),
    Gpu("A100-PCIE-80GB", 312, 80, 1.935),
    Gpu("A100-PCIE-40GB", 312, 40, 1.555),
    Gpu("A800-80GB", 312, 80, 2.039),
    Gpu("H100-SXM-80GB", 989, 80, 3.35, has_fp8=True),
    Gpu("H100-SXM-96GB", 989, 96, 2.4, has_fp8=True),
    Gpu("H100-PCIE-80GB", 756, 80, 2.0, has_fp8=True),
    Gpu("H100-NVL-94GB", 835, 94, 3.9, has_fp8=True),
    Gpu("H800-80GB", 989, 80, 3.35, has_fp8=True),
    Gpu("H200-141GB", 989, 141, 4.8, has_fp8=True),
    Gpu("H20-96GB", 148, 96, 4.0, has_fp8=True),
    Gpu("GH200-96GB", 989, 96, 4.0, has_fp8=True),
    Gpu("B200-180GB", 2250, 180, 8.0, has_fp8=True, has_fp4=True),
    Gpu("B300-279GB", 2250, 279, 8.0, has_fp8=True, has_fp4=True),
    Gpu("GB200-186GB", 2500, 186, 8.0, has_fp8=True, has_fp4=True),
    Gpu("GB300-279GB", 2500, 279, 8.0, has_fp8=True, has_fp4=True),
    Gpu("MI300X-192GB", 1307, 192, 5.3, has_fp8=True),
    Gpu("MI325X-256GB", 1307, 256, 6.0, has_fp8=True),
    Gpu("MI355X-288GB", 2500, 288, 8.0, has_fp8=True, has_fp4=True),
    Gpu("L40S-48GB", 362, 48, 0.864, has_fp8=True),
    Gpu("L4-24GB", 121, 24, 0.3, has_fp8=True),
    Gpu("A6000-48GB", 154.8, 48, 0.768),
    Gpu("A40-48GB", 149.7, 48, 0.696),
    Gpu("A30-24GB", 165, 24, 0.933),
    Gpu("A10G-24GB", 70, 24, 0.6),
    Gpu("A10-24GB", 125, 24, 0.6),
    Gpu("V100-SXM2-32GB", 125, 32, 0.9, has_bf16=False),
    Gpu("V100-SXM2-16GB", 125, 16, 0.9, has_bf16=False),
    Gpu("T4-16GB", 65, 16, 0.32, has_bf16=False),
)


def peak_flops(device_name: str) -> float | None:
    """Return FLOP/s of the card NVML or CUDA calls `device_name`, or None if it is unknown.

    >>> peak_flops("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    >>> peak_flops("Radeon") is None
    True
    """
    cards = _named(device_name)
    return cards[0].peak_flops if cards else None


def find_gpu(name: str) -> Gpu:
    """Return the card of any usual name: A100-SXM4-80GB, a100-80gb, A100, "NVIDIA H100 80GB HBM3". Raise
    UnknownGpuError if it is not in the table, or not made with that much memory."""
    words = _words(name)
    family = _of_family(name, words)
    if is_slice(name):
        raise UnknownGpuError(
            f"{printable(name)!r} is a slice of a card (MIG), which is not in the table; {FLAGS_INSTEAD} "
            "the whole card's name"
        )
    if not family:
        known = [gpu.name for gpu in GPUS]
        close = nearest(name.upper(), [*dict.fromkeys(gpu.family for gpu in GPUS), *known])
        raise UnknownGpuError(
            f"no GPU {printable(name)!r} in the table{close}; {FLAGS_INSTEAD} one of: {', '.join(known)}"
        )
    asked = _memory_in(words)
    cards = [gpu for gpu in family if not asked or int(gpu.memory_gib) in asked]
    if not cards:
        raise UnknownGpuError(
            f"{family[0].family} is not made with the memory of {printable(name)!r}; there are: "
            f"{', '.join(gpu.name for gpu in family)}"
        )
    return _of_form(cards, words)[0]


def smaller_cards(name: str) -> list[str]:
    """Return the cards that `name` also fits and that have less memory than `find_gpu`'s choice.

    >>> smaller_cards("a100")
    ['A100-SXM4-40GB', 'A100-PCIE-40GB']
    >>> smaller_cards("a100-80gb"), smaller_cards("h100"), smaller_cards("Radeon")
    ([], [], [])
    """
    cards = [] if _memory_in(_words(name)) else _named(name)
    return [gpu.name for gpu in cards if gpu.memory_gib < cards[0].memory_gib]


def is_named(gpu: Gpu, name: str) -> bool:
    """True if `name`, which may leave out memory and form, is a name of this card.

    >>> is_named(find_gpu("a100-40gb"), "a100"), is_named(find_gpu("a100-40gb"), "a100-80gb")
    (True, False)
    """
    asked = _memory_in(_words(name))
    return gpu in _named(name) and (not asked or int(gpu.memory_gib) in asked)


def is_slice(name: str) -> bool:
    """True if a name is that of a slice of a card.

    >>> is_slice("h100_1g.10gb"), is_slice("NVIDIA A100-SXM4-40GB MIG 1g.5gb"), is_slice("h100_80gb")
    (True, True, False)
    """
    return _SLICE.search(name) is not None


def _memory_in(words: set[str]) -> set[int]:
    asked = {int(found[1]) for word in words if (found := re.fullmatch(r"(\d{2,3})G?B?", word))}
    return asked - {_GH200_HOST_GB}


def _words(name: str) -> set[str]:
    return set(re.split(r"[^A-Z0-9]+", name.upper())) - {""}


def _of_family(name: str, words: set[str]) -> list[Gpu]:
    """Return the cards of a family; empty for a slice."""
    return [] if is_slice(name) else [gpu for gpu in GPUS if gpu.family in words]


def _named(name: str) -> list[Gpu]:
    """Return the cards of the family and form factor in a name, of any memory."""
    words = _words(name)
    return _of_form(_of_family(name, words), words)


def _of_form(cards: list[Gpu], words: set[str]) -> list[Gpu]:
    """Return the cards of the form factor in `words`; all if it names none that exists."""
    forms = {_FORMS[word] for word in words if word in _FORMS}
    fitting = [gpu for gpu in cards if forms & {_FORMS.get(part, "") for part in gpu.name.split("-")}]
    return fitting or cards


def gpu_type_of(config: "RunConfig") -> str | None:
    """Return the card to plan memory and hours for; None: unknown.

    resources.gpu_type wins over cluster.gpu_type if it names a card or a slice, and another one than the
    cluster's: sites also give cards their own names.
    """
    asked, usual = config.resources.gpu_type, config.cluster.gpu_type
    if asked is None or not (is_slice(asked) or known_card(asked)):
        return usual
    card = known_card(usual)
    # The cluster's name may add the memory of the same card.
    return usual if card is not None and is_named(card, asked) else asked


def known_card(name: str | None) -> Gpu | None:
    """Return the card like `find_gpu`; None if there is no name, or it is not in the table."""
    try:
        return find_gpu(name) if name else None
    except UnknownGpuError:
        return None
