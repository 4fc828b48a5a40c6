"""Copies in host memory: the state as it was, whatever becomes of it afterwards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from r1hpc.base.units import GIB
from r1hpc.train.checkpoint.async_save import HostCopies, num_bytes, room_for_copies


class Scaler:
    def __init__(self) -> None:
        self.scale = 2.0


def state() -> dict[str, Any]:
    flat = torch.arange(12.0)
    return {
        "view": flat[2:6],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "rows": [flat.view(3, 4)[1], {"scaler": Scaler(), "shape": torch.Size([3, 4])}],
        "empty": torch.empty(0),
    }


def test_training_goes_on_and_the_copy_stays() -> None:
    original = state()
    copy = HostCopies().copy("a", original)
    original["view"].zero_()
    original["parameter"].data.zero_()
    original["rows"][1]["scaler"].scale = 1.0
    assert copy["view"].tolist() == [2, 3, 4, 5]
    assert copy["view"].untyped_storage().nbytes() == 16  # not the whole that it is a view of
    assert isinstance(copy["parameter"], torch.nn.Parameter)
    assert copy["parameter"].tolist() == [1, 1, 1]
    assert copy["rows"][1]["scaler"].scale == 2.0
    assert copy["rows"][1]["shape"] == torch.Size([3, 4])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64]
)
@pytest.mark.parametrize("shape", [(0,), (), (3, 0), (2, 3), (1 << 20,)], ids=str)
def test_every_kind_and_shape_is_copied(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    original = torch.arange(2).repeat(1 << 19).to(dtype)[: math.prod(shape)].view(shape)
    copy = HostCopies().copy("a", {"tensor": original})["tensor"]
    assert (copy.dtype, copy.shape, copy.stride()) == (dtype, original.shape, original.stride())
    assert copy.float().equal(original.float())


def test_the_memory_is_used_again_where_it_fits() -> None:
    copies, original = HostCopies(), state()
    first = copies.copy("a", original)["view"].data_ptr()
    assert copies.holds("a")
    assert copies.copy("a", original)["view"].data_ptr() == first
    assert copies.copy("b", original)["view"].data_ptr() != first
    other = copies.copy("a", {"view": torch.ones(5), "more": torch.ones(2)})
    assert other["view"].tolist() == [1] * 5


def test_tensors_at_one_place_are_copied_once() -> None:
    weight = torch.randn(8)
    tied = {"embedding": weight.detach(), "head": weight.detach(), "other": weight.view(2, 4)}
    copy = HostCopies().copy("a", tied)
    assert copy["embedding"].data_ptr() == copy["head"].data_ptr()
    assert num_bytes({"embedding": weight.detach(), "head": weight.detach()}) == 32


def test_room_is_what_the_tightest_cgroup_leaves(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 104857600 kB\n")
    (proc / "self/cgroup").write_text("0::/job_1/step_0\n")
    assert room_for_copies(cgroup, proc) == int(0.8 * 100 * GIB)
    limit(cgroup / "job_1", "10737418240")
    limit(cgroup / "job_1/step_0", "max")
    assert room_for_copies(cgroup, proc) == int(0.8 * (10 - 4 + 1) * GIB)


def limit(folder: Path, most: str) -> None:
    """A cgroup (version 2) of 4 GiB in use, of which 1 GiB is page cache."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{4 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
