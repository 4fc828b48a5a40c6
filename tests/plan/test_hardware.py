"""Peaks are found by whole words of the device's name."""

import pytest

from r1hpc.plan.topology.gpus import GPUS, UnknownGpuError, find_gpu, peak_flops, smaller_cards

SLICES = ("nvidia_h100_80gb_hbm3_1g.10gb", "nvidia_a100_80gb_pcie_3g.40gb", "h100_1g.10gb", "a100-1G.5GB")
"""By Slurm's AutoDetect, and as sites write them."""


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GB200", 2500),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
    ],
)
def test_known_cards(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        *("Radeon", "", "NVIDIA RTX A4000", "NVIDIA L40", "NVIDIA GeForce RTX 4090"),
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        *SLICES,
    ],
)
def test_unknown_cards_give_nothing_rather_than_a_guess(name: str) -> None:
    assert peak_flops(name) is None


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_not_taken_for_its_card(name: str) -> None:
    with pytest.raises(UnknownGpuError, match="slice of a card"):
        find_gpu(name)
    assert smaller_cards(name) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("a100-80gb", "A100-SXM4-80GB"),
        ("a100", "A100-SXM4-80GB"),
        ("A100 40G", "A100-SXM4-40GB"),
        ("a100_40gb", "A100-SXM4-40GB"),
        ("a100-pcie-40gb", "A100-PCIE-40GB"),
        ("H100-SXM-80GB", "H100-SXM-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80GB"),
        ("h100-pcie", "H100-PCIE-80GB"),
        ("H800-80GB", "H800-80GB"),
        ("A800-80GB", "A800-80GB"),
        ("H200-141GB", "H200-141GB"),
        ("GH200", "GH200-96GB"),
        ("h100-96gb", "H100-SXM-96GB"),
        ("NVIDIA GB200", "GB200-186GB"),
        ("gb300", "GB300-279GB"),
        ("NVIDIA B300", "B300-279GB"),
        ("AMD Instinct MI300X", "MI300X-192GB"),
        ("mi325x", "MI325X-256GB"),
        ("mi355x-288gb", "MI355X-288GB"),
        ("NVIDIA GH200 480GB", "GH200-96GB"),
        ("A40-48GB", "A40-48GB"),
        ("v100-16gb", "V100-SXM2-16GB"),
        ("Tesla T4", "T4-16GB"),
    ],
)
def test_usual_names(name: str, expected: str) -> None:
    assert find_gpu(name).name == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("radeon", "--peak-tflops"),
        ("", "no GPU ''"),
        ("a100-48gb", "A100-SXM4-40GB"),
        ("h10", "did you mean"),
    ],
)
def test_unknown_names_get_an_answer_that_helps(name: str, message: str) -> None:
    with pytest.raises(UnknownGpuError, match=message):
        find_gpu(name)


def test_every_card_is_found_by_its_own_name() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
