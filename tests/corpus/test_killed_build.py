"""A killed build, or one on a full disk, is all or nothing, and the next goes on with what is done."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r1hpc.corpus.build.build import build_dataset
from r1hpc.data.read.reader import open_dataset
from tests.corpus.builds import BPE, done_units, names, start_build
from tests.corpus.corpus import build, tree, write_recipe, write_texts


@pytest.mark.parametrize("failpoint", ["data.build.span:kill9::5", "data.build.publish:kill9"])
def test_killed_build_goes_on_with_what_is_done(tmp_path: Path, failpoint: str) -> None:
    reference = build(tmp_path / "a", tokenizer=BPE, part_bytes=900)
    write_texts(tmp_path / "b")
    recipe = write_recipe(tmp_path / "b", tokenizer=BPE, part_bytes=900)
    out = tmp_path / "data" / "out"
    process = start_build(recipe, out, failpoint=failpoint)
    assert process.wait(60) == -signal.SIGKILL
    assert names(out.parent) == {".staging"}
    before = done_units(out.parent)
    assert len(before) >= 2
    # Killed again at the end, so that the units can be looked at: not one of them was made anew.
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(60) == -signal.SIGKILL
    assert before.items() <= done_units(out.parent).items()
    assert build_dataset(recipe, out).id == reference.id
    assert names(out.parent) == {"out"}


def test_change_of_an_input_redoes_its_part_alone(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    out = tmp_path / "data" / "out"
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(60) == -signal.SIGKILL
    before = done_units(out.parent)
    content = (tmp_path / "docs/000.txt").read_text()
    (tmp_path / "docs/000.txt").write_text(content.replace("fox", "cat"))  # of the same size
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(60) == -signal.SIGKILL
    assert len(done_units(out.parent)) == len(before) + 1
    assert build_dataset(recipe, out).id == build_dataset(recipe, tmp_path / "fresh").id


def test_damaged_unit_is_made_again(tmp_path: Path) -> None:
    reference = build(tmp_path / "a", part_bytes=900)
    write_texts(tmp_path / "b")
    recipe = write_recipe(tmp_path / "b", part_bytes=900)
    out = tmp_path / "data" / "out"
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(60) == -signal.SIGKILL
    shards = sorted(out.parent.glob(".staging-*/units/tokens/*/part/tokens/c/0"))
    os.truncate(shards[0], 10)
    shards[1].unlink()
    assert build_dataset(recipe, out).id == reference.id
    assert open_dataset(out).num_tokens == reference.num_tokens


def test_unit_is_taken_over_from_another_host(tmp_path: Path) -> None:
    """Neither the host's name nor the process enters a unit, so a requeued build goes on elsewhere."""
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    out = tmp_path / "data" / "out"
    assert start_build(recipe, out, failpoint="data.build.span:kill9::7").wait(60) == -signal.SIGKILL
    owner = out.parent / ".staging-out/owner.json"
    owner.write_text(json.dumps(json.loads(owner.read_text()) | {"host": "elsewhere"}))
    before = done_units(out.parent)
    assert before
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(60) == -signal.SIGKILL
    assert before.items() <= done_units(out.parent).items()
    assert build_dataset(recipe, out).built
    assert names(out.parent) == {"out"}


def test_kill_after_the_dataset_has_its_name(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    out = tmp_path / "data" / "out"
    assert start_build(recipe, out, failpoint="data.build.published:kill9").wait(60) == -signal.SIGKILL
    assert names(out.parent) == {"out", ".staging"}
    assert not build_dataset(recipe, out).built
    assert names(out.parent) == {"out"}


def test_a_folder_made_before_costs_a_failed_build_nothing(tmp_path: Path) -> None:
    """`mkdir DIR` first, and a build that ends with an error: what is done stays."""
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    out = tmp_path / "data" / "out"
    out.mkdir(parents=True)
    assert start_build(recipe, out, failpoint="data.build.publish:enospc").wait(60) == 1
    before = done_units(out.parent)
    assert before
    assert start_build(recipe, out, failpoint="data.build.publish:kill9").wait(60) == -signal.SIGKILL
    assert done_units(out.parent) == before
    assert build_dataset(recipe, out).built
    assert names(out.parent) == {"out"}


def test_killed_parent_takes_its_workers_along(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    process = start_build(recipe, tmp_path / "out", "--workers", "2", failpoint="data.build.span:sleep=60")
    children = _wait_for(lambda: _spawned_workers(process.pid), 2)
    live = {path.name for path in tmp_path.glob(".staging-*")}
    assert build(tmp_path, "beside").built  # a build beside it leaves the living one's folder alone
    assert {path.name for path in tmp_path.glob(".staging-*")} == live
    process.kill()
    process.wait(30)
    deadline = time.monotonic() + 20
    while any(_is_running(child) for child in children):
        assert time.monotonic() < deadline, "a writer outlived its parent"
        time.sleep(0.05)
    assert build_dataset(recipe, tmp_path / "out").built
    assert names(tmp_path) == {"docs", "recipe.yaml", "beside", "out"}


def test_killed_worker_is_an_error_and_the_next_build_goes_on(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    process = start_build(recipe, tmp_path / "out", "--workers", "2", failpoint="data.build.span:kill9::2")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"a writer process died" in stderr
    assert names(tmp_path) - {".staging"} == {"docs", "recipe.yaml"}
    assert build_dataset(recipe, tmp_path / "out").built
    assert names(tmp_path) == {"docs", "recipe.yaml", "out"}


@pytest.mark.parametrize("failpoint", ["data.build.publish:enospc", "data.unit.publish:enospc"])
def test_full_disk_is_an_error_and_the_next_build_goes_on(tmp_path: Path, failpoint: str) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    process = start_build(recipe, tmp_path / "out", failpoint=failpoint)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"No space left" in stderr
    # What is done is kept; where nothing is, nothing is left.
    left = {".staging"} if failpoint.startswith("data.build") else set()
    assert names(tmp_path) == {"docs", "recipe.yaml"} | left
    assert build_dataset(recipe, tmp_path / "out").built
    assert names(tmp_path) == {"docs", "recipe.yaml", "out"}


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 3])
def test_kills_at_any_moment(tmp_path: Path, workers: int) -> None:
    write_texts(tmp_path, count=60, num_words=2000)
    recipe = write_recipe(tmp_path, tokenizer=BPE, part_bytes=20_000)
    reference = build_dataset(recipe, tmp_path / "reference")
    out = tmp_path / "data" / "out"
    draw = np.random.default_rng(workers)
    for _ in range(25):
        process = start_build(recipe, out, "--workers", str(workers))
        time.sleep(float(draw.uniform(0.05, 3.0)))
        process.kill()
        process.wait(30)
        if out.exists():
            assert open_dataset(out).id == reference.id
            assert tree(out) == tree(reference.path)
            out.rename(tmp_path / f"done-{time.monotonic_ns()}")
    assert build_dataset(recipe, out).id == reference.id
    assert names(out.parent) == {"out"}


def _spawned_workers(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children")
    pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _wait_for(find: Any, count: int) -> list[int]:
    deadline = time.monotonic() + 30
    while len(found := find()) < count:
        assert time.monotonic() < deadline, f"only {found} after 30 s"
        time.sleep(0.05)
    time.sleep(1.0)  # into the writers' work
    return list(found)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
