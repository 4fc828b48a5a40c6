"""Which GPUs CUDA_VISIBLE_DEVICES selects."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.telemetry.gpu.nvml import select_visible

NODE = ("GPU-aa11", "GPU-ab22", "GPU-bb33", "GPU-cc44")


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, NODE),
        ("0,1,2,3", NODE),
        ("2,0", ("GPU-bb33", "GPU-aa11")),
        (" 1 , 2 ", ("GPU-ab22", "GPU-bb33")),
        ("GPU-cc44,GPU-aa11", ("GPU-cc44", "GPU-aa11")),
        ("GPU-aa,GPU-c", ("GPU-aa11", "GPU-cc44")),
        ("1,1,GPU-ab22", ("GPU-ab22",)),
        ("MIG-5,0", ("MIG-5", "GPU-aa11")),
        ("", ()),
    ],
)
def test_entries_are_indices_uuids_or_their_beginnings(visible: str | None, chosen: tuple[str, ...]) -> None:
    assert select_visible(NODE, visible) == (chosen, None)


@pytest.mark.parametrize("wrong", ["4", "-1", "GPU-a", "GPU-dd", "NoDevFiles", "\N{SUPERSCRIPT TWO}"])
def test_the_list_ends_at_the_first_entry_that_names_no_gpu(wrong: str) -> None:
    chosen, odd = select_visible(NODE, f"1,{wrong},2")
    assert chosen == ("GPU-ab22",)
    assert odd is not None
    assert repr(wrong) in odd


@given(st.text(alphabet="0123456789,-GPUMIabc \x1b", max_size=40))
def test_no_text_selects_what_is_not_there(visible: str) -> None:
    chosen, odd = select_visible(NODE, visible)
    assert len(set(chosen)) == len(chosen)
    assert all(uuid in NODE or uuid.startswith("MIG-") for uuid in chosen)
    assert odd is None or "\x1b" not in odd
