"""A range of prompts is the same wherever its reading begins, and what stands before it is read once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.recipe.stages import GenerateRecipe
from r1hpc.corpus.sources import prompts
from r1hpc.corpus.sources.lines import Line, iter_lines
from r1hpc.corpus.sources.prompts import PromptRange, prompt_ranges, read_prompts

ROWS = [{"prompt": f"{number} " + "é" * (number % 7), "more": number} for number in range(500)]


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=90)
    else:
        raw = "\n\n".join(json.dumps(row) for row in ROWS).encode()
        path.write_bytes(pyarrow.compress(raw, "gzip", asbytes=True) if path.suffix == ".gz" else raw)
    return path


def generate(**keys: Any) -> GenerateRecipe:
    return GenerateRecipe(teacher="t", prompts="p", **keys)


def forget() -> None:
    """As a new process has it."""
    prompts._places.cache_clear()


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
@pytest.mark.parametrize("num_prompts", [None, 333])
def test_every_range_holds_its_own_prompts(tmp_path: Path, name: str, num_prompts: int | None) -> None:
    path, asked = write(tmp_path / name), generate(prompts_per_unit=70, num_prompts=num_prompts)
    forget()
    ranges = list(prompt_ranges(path, asked))
    assert [part.stop for part in ranges][-1] == (num_prompts or len(ROWS))
    for is_known in (True, False):
        for part in (ranges[-1], *ranges):
            if not is_known:
                forget()
            found = [row for _, row in read_prompts(path, asked, part)]
            assert found == [{"prompt": row["prompt"]} for row in ROWS[part.start : part.stop]]
    with pytest.raises(UsageError, match="has changed since this build began"):
        read_prompts(path, asked, PromptRange(1, 71, ranges[0].digest))


def test_what_stands_before_a_range_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = write(tmp_path / "p.jsonl"), generate(prompts_per_unit=10)
    forget()
    ranges = list(prompt_ranges(path, asked))
    begun: list[int] = []

    def from_there(file: Path, start: int, stop: int | None) -> Iterator[Line]:
        begun.append(start)
        return iter_lines(file, start, stop)

    monkeypatch.setattr(prompts, "iter_lines", from_there)
    read_prompts(path, asked, ranges[-1])
    assert begun[0] > path.stat().st_size * 0.8
    path.write_bytes(b"\n" + path.read_bytes())  # another file: nothing is known of it
    os.utime(path, ns=(0, 0))
    assert [row for _, row in read_prompts(path, asked, ranges[-1])][-1] == {"prompt": ROWS[-1]["prompt"]}
    assert begun[1] == 0
