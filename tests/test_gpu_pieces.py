"""`make gpu` in small: its quick pieces run here, on CPUs, so that on a card only the card is new.

python -m pytest tests/test_gpu_pieces.py -m soak      # the other pieces, minutes
"""

from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.page import page
from benchmarks.gpu.place import CHECKOUT, PieceError
from benchmarks.gpu.table import Result, Table, load, save

QUICK = ("install", "decode", "nvml")
SLOW = tuple(name for name in gpu.PIECES if name not in (*QUICK, "vllm"))
CARD = {"card": "1 x NVIDIA H100", "driver": "570.1"}


def run_small(name: str, folder: Path) -> Result:
    gpu.run_piece(name, "cpu", folder)
    result = load(folder / "figures", name)
    assert result is not None
    return result


def is_whole(result: Result) -> bool:
    return bool(result.tables) and all(
        table.rows and all(len(row) == len(table.header) for row in table.rows) for table in result.tables
    )


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_piece_leaves_its_figures(name: str, tmp_path: Path) -> None:
    result = run_small(name, tmp_path)
    assert result.failure == ""
    assert is_whole(result)
    assert result.facts["card"] == "none: the CPU"
    assert result.facts["torch"]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_piece_leaves_its_figures(name: str, tmp_path: Path) -> None:
    result = run_small(name, tmp_path)
    assert result.failure == ""
    assert is_whole(result)


def test_a_piece_that_fails_is_on_the_page_and_costs_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(place: object) -> list[Table]:
        raise PieceError("the card fell off the bus")

    monkeypatch.setattr(gpu, "_piece", lambda name: fails)
    monkeypatch.setattr(gpu, "facts", lambda device: CARD)
    assert not gpu.run_piece("speed", "cpu", tmp_path)
    save(tmp_path / "figures", result("decode"))
    text = page(tmp_path / "figures", list(gpu.PIECES))
    assert "the card fell off the bus" in text
    assert "| 0.5B | 7.5 |" in text
    assert "the card fell off the bus" in capsys.readouterr().out


def result(piece: str, facts: dict[str, str] = CARD) -> Result:
    table = Table("Decoding", ("model", "ms"), (("0.5B", "7.5"),), ("Read so.",))
    return Result(piece, f"python -m benchmarks.gpu {piece}", 61.0, (table,), facts)


def test_the_page_says_what_has_not_run_on_a_card(tmp_path: Path) -> None:
    assert "nothing of this has run on one" in page(tmp_path, ["install", "decode"])
    save(tmp_path, result("decode", {"card": "none: the CPU"}))
    small = page(tmp_path, ["install", "decode"])
    assert "nothing of this has run on one" in small
    assert "7.5" not in small, "figures of a CPU are no figures of a card"
    save(tmp_path, result("decode"))
    text = page(tmp_path, ["install", "decode"])
    assert "nothing of this has run on one" not in text
    assert "## install\n\nHas not run.\n" in text
    assert "card 1 x NVIDIA H100, driver 570.1" in text


def test_a_damaged_file_of_figures_is_a_piece_that_has_not_run(tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text('{"piece": 1}')
    assert load(tmp_path, "decode") is None


def test_the_page_in_docs_has_a_place_for_every_piece(tmp_path: Path) -> None:
    text = (CHECKOUT / "benchmarks" / "gpu" / "results.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(gpu.PIECES)
    if "nothing of this has run on one" in text:
        assert text == page(tmp_path, list(gpu.PIECES))
