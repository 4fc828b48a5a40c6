"""`--engine dask` on a real cluster of two worker processes: the same units, the same dataset."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.engine import units
from r1hpc.data.format.errors import DataError
from r1hpc.shard import main
from r1hpc.train.generate.teach_unit import TeachTask
from tests.cluster.processes import until
from tests.corpus.builds import done_units, names
from tests.corpus.corpus import tree, write_recipe
from tests.corpus.teachers import write_teacher
from tests.corpus.test_generated import GENERATE, SUMS, write_prompts
from tests.corpus.test_prepare import STAGES, prose, source, write_lines

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.xdist_group("dask")


@pytest.fixture(scope="module")
def dask() -> Iterator[Any]:
    """Two worker processes, each unit slow enough to be met."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("R1HPC_FAILPOINT", "data.unit.publish:sleep=0.5::*")
        with distributed.LocalCluster(**options) as cluster:
            patch.undo()
            yield cluster


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Cleaning, deduplication and a mixture of two sources, in parts of a few documents."""
    write_lines(tmp_path / "a.jsonl", [prose(n) for n in range(40)])
    write_lines(tmp_path / "b.jsonl", [prose(n) for n in range(100, 140)] + [prose(3)])
    (tmp_path / "test.jsonl").write_text('{"question": "How many gardens has the town by the river?"}\n')
    return write_recipe(tmp_path, sources=[source("a"), source("b")], **STAGES)


def test_the_dataset_is_the_local_one_to_the_byte(dask: Any, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "out"
    words = ["build", str(recipe), "--out", str(out), "--engine", "dask"]
    assert main([*words, "--scheduler", dask.scheduler_address]) == 0
    assert tree(build_dataset(recipe, tmp_path / "alone").path) == tree(out)
    assert names(out.parent) == {"out"}


def test_two_builds_beside_each_other_make_their_own_units(dask: Any, recipe: Path, tmp_path: Path) -> None:
    """The same units by their key, which Dask takes for the same work; each folder wants its own."""
    built: list[str] = []

    def build(out: Path) -> None:
        with units.dask_pool(dask.scheduler_address) as work_off:
            built.append(build_dataset(recipe, out, work_off=work_off).id)

    both = [threading.Thread(target=build, args=(tmp_path / name,), daemon=True) for name in ("one", "two")]
    for each in both:
        each.start()
    until("both are built", lambda: not any(each.is_alive() for each in both), 100)
    assert len(built) == 2
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_teacher_writes_there_too(dask: Any, tmp_path: Path) -> None:
    write_teacher(tmp_path / "teacher")
    write_prompts(tmp_path, SUMS)
    path = write_recipe(tmp_path, sources=[{"name": "sums", "generate": GENERATE}])
    file = tmp_path / "scheduler.json"
    # As the scheduler writes it, without its workers: once they have worked their records have keys that
    # JSON does not take.
    file.write_text(json.dumps(dask.scheduler.identity(n_workers=0)))
    with units.dask_pool(str(file)) as work_off:
        there = build_dataset(path, tmp_path / "there", teach=TeachTask, work_off=work_off)
    assert there.id == build_dataset(path, tmp_path / "alone", teach=TeachTask).id


def test_a_killed_worker_costs_the_unit_it_was_at(dask: Any, recipe: Path, tmp_path: Path) -> None:
    reference, out, built = build_dataset(recipe, tmp_path / "alone"), tmp_path / "data" / "out", []
    with (
        units.dask_pool(dask.scheduler_address) as work_off,
        distributed.Client(dask.scheduler_address, set_as_default=False) as client,
    ):
        build = threading.Thread(
            target=lambda: built.append(build_dataset(recipe, out, work_off=work_off).id), daemon=True
        )
        build.start()
        until("a unit is done", lambda: bool(done_units(out.parent)), 60)
        busy: list[str] = []

        def is_one_busy() -> bool:
            busy[:] = at_work(client)
            return bool(busy)

        until("a worker is at another", is_one_busy, 60)
        (victim,) = client.run(os.getpid, workers=busy[:1]).values()
        os.kill(victim, signal.SIGKILL)
        until("the others are done", lambda: not build.is_alive(), 60)
    assert built == [reference.id]


def at_work(client: Any) -> list[str]:
    """Addresses of the workers that are at a unit."""
    return [address for address, keys in client.processing().items() if keys]


def test_an_input_that_cannot_be_read_is_the_same_sentence(dask: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [prose(1)], "{broken\n")
    path = write_recipe(tmp_path, sources=[source("a")], clean={})
    with (
        units.dask_pool(dask.scheduler_address) as work_off,
        pytest.raises(UsageError, match=r"a\.jsonl at \d+: not JSON"),
    ):
        build_dataset(path, tmp_path / "out", work_off=work_off)


def test_workers_of_other_code_are_refused(
    dask: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "code_hash", lambda: "another")
    with (
        units.dask_pool(dask.scheduler_address) as work_off,
        pytest.raises(DataError, match="has another version of r1hpc"),
    ):
        build_dataset(recipe, tmp_path / "out", work_off=work_off)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["build", "smoke", "--out", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="--engine dask and --scheduler ADDRESS"):
        main([*words, "--engine", "dask"])
    with pytest.raises(UsageError, match="--engine dask and --scheduler ADDRESS"):
        main([*words, "--scheduler", "tcp://here:1"])
    monkeypatch.setattr(units, "_CONNECT_S", 0.5)
    with pytest.raises(UsageError, match="no Dask scheduler answers there"):
        main([*words, "--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"])
    with pytest.raises(UsageError, match="no Dask scheduler answers there"):
        main([*words, "--engine", "dask", "--scheduler", str(tmp_path / "scheduler.json")])
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(R1hpcError, match=r"pip install 'r1hpc\[dask\]'"):
        main([*words, "--engine", "dask", "--scheduler", "tcp://127.0.0.1:9"])
