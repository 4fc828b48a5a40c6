"""Names that may become a path, and text that may reach a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.base.names import check_name, nearest, printable


@pytest.mark.parametrize("name", ["a", "run-1", "A.b_c-9", "_x", "9", "x" * 64])
def test_good_names(name: str) -> None:
    assert check_name(name, "name") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "-x",
        "a/b",
        "../x",
        "a b",
        "a\n",
        "a\x00",
        "x" * 65,
        "é",
        "a;b",
        "$(x)",
        "a\u202eb",
    ],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError, match=r"run name .* is not a usable name"):
        check_name(name, "run name")


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


def test_nearest() -> None:
    assert nearest("nmu_steps", ["lr", "num_steps"]) == " (did you mean 'num_steps'?)"
    assert nearest("zzz", ["lr", "num_steps"]) == ""
    assert nearest("x", []) == ""
    assert nearest("--gres", ["--resume", "--follow"]) == ""
    assert nearest("train.foo", ["train.lr", "train.seed", "train.eps"]) == ""
    assert nearest("train.beta", ["train.beta1"]) == " (did you mean 'train.beta1'?)"
    assert nearest("resources.gpus", ["resources.gpus_per_node"]) == (
        " (did you mean 'resources.gpus_per_node'?)"
    )
