"""Windows are right wherever they begin, in any process, and only of the dataset asked for."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.data.format.errors import DataError, DatasetMismatchError, DatasetMissingError
from r1hpc.data.read import reader
from r1hpc.data.read.reader import open_dataset
from tests.corpus.children import read_sums
from tests.corpus.corpus import build


@pytest.fixture(scope="module", params=["train", "compact"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several parts of several shards, each with a padded last one."""
    return build(tmp_path_factory.mktemp("reader"), profile=request.param, part_bytes=1800).path


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    parts = sorted((path / "parts").glob("part-*"))
    arrays: list[Any] = [zarr.open_array(part / "tokens", mode="r") for part in parts]
    return np.concatenate([array[:] for array in arrays])


@pytest.mark.parametrize("verify", ["once", "every"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_window_equals_zarr(path: Path, expected: Any, verify: str, data: st.DataObject) -> None:
    dataset = open_dataset(path, verify=verify)
    assert dataset.num_tokens == len(expected)
    for _ in range(20):
        start = data.draw(st.integers(0, dataset.num_tokens))
        length = data.draw(st.one_of(st.integers(0, 40), st.integers(0, dataset.num_tokens - start)))
        length = min(length, dataset.num_tokens - start)
        window = dataset.read(start, length)
        assert window.dtype == dataset.dtype
        assert np.array_equal(window, expected[start : start + length])


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, -1), (10**9, 1), (-(10**9), 10**9)])
def test_window_outside_is_refused(path: Path, start: int, length: int) -> None:
    dataset = open_dataset(path)
    for _ in range(2):  # before and after the chunk was verified
        with pytest.raises(IndexError, match="outside"):
            dataset.read(start, length)
        dataset.read(0, 64)
    with pytest.raises(IndexError, match="outside"):
        dataset.read(dataset.num_tokens - 3, 4)


def test_another_dataset_is_refused_by_name(tmp_path: Path) -> None:
    one, other = build(tmp_path, "one"), build(tmp_path, "other", part_bytes=1000)
    with pytest.raises(DatasetMismatchError) as error:
        open_dataset(one.path, expected_id=other.id)
    assert one.id in str(error.value)
    assert other.id in str(error.value)
    assert open_dataset(one.path, expected_id=one.id).id == one.id


def test_no_dataset_names_the_build_command(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(DatasetMissingError, match=r"r1hpc\.shard build"):
            open_dataset(path)


def test_unknown_policy(path: Path) -> None:
    with pytest.raises(UsageError, match="once or every"):
        open_dataset(path, verify="never")


def test_foreign_codecs_are_not_guessed_at(tmp_path: Path) -> None:
    from r1hpc.data.format.zarr_shard import parse_layout

    zarr.create_array(tmp_path / "z", shape=(100,), dtype="uint16", chunks=(10,), shards=(50,))
    with pytest.raises(DataError, match="zarr-python"):
        parse_layout(tmp_path / "z", (tmp_path / "z/zarr.json").read_bytes())
    zarr.create_array(tmp_path / "y", shape=(100,), dtype="uint16", chunks=(10,))
    with pytest.raises(DataError):
        parse_layout(tmp_path / "y", (tmp_path / "y/zarr.json").read_bytes())


def test_few_files_stay_open(path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the iterdir handle itself would be counted
    dataset = open_dataset(path)
    for start in np.random.default_rng(0).integers(0, dataset.num_tokens - 10, 500).tolist():
        assert np.array_equal(dataset.read(start, 10), expected[start : start + 10])
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208
    del dataset
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_threads_share_a_dataset_while_files_are_evicted(
    path: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_OPEN_FILES", 1)
    dataset = open_dataset(path)
    wrong: list[object] = []

    def run(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, dataset.num_tokens - 100, 1500).tolist():
            try:
                if not np.array_equal(dataset.read(start, 100), expected[start : start + 100]):
                    wrong.append(start)
            except DataError as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_children_read_what_the_parent_opened(path: Path, expected: Any, method: str) -> None:
    dataset = open_dataset(path)
    dataset.read(0, 100)  # open files and verified chunks are there before the children are
    context = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=read_sums, args=(dataset, seed, results)) for seed in range(4)]  # type: ignore[attr-defined]
    for child in children:
        child.start()
    found = dict(results.get(timeout=60) for _ in children)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    for seed, sums in found.items():
        starts = np.random.default_rng(seed).integers(0, dataset.num_tokens - 50, 200).tolist()
        assert sums == [int(expected[start : start + 50].sum(dtype=np.int64)) for start in starts]


def test_pickle_pins_the_dataset(path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(open_dataset(path, verify="every")))
    assert (dataset.id, dataset.verify) == (open_dataset(path).id, "every")


def test_a_pickled_copy_asks_for_no_file_before_it_reads(path: Path, expected: Any) -> None:
    sent = pickle.dumps(open_dataset(path))
    away = path.with_name("away")
    path.rename(away)
    try:
        copy = pickle.loads(sent)
    finally:
        away.rename(path)
    assert (copy.read(0, copy.num_tokens) == expected).all()


def test_reading_imports_neither_zarr_nor_torch(path: Path) -> None:
    code = (
        "import sys; import r1hpc.shard, r1hpc.data.read.loader;"
        "from r1hpc.data.read.reader import open_dataset;"
        f"open_dataset({str(path)!r}).read(0, 10);"
        "print([m for m in ('zarr', 'torch', 'h5py', 'tokenizers', 'pyarrow') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert found.stdout.strip() == "[]"


def test_every_token_leads_to_its_document(path: Path) -> None:
    dataset = open_dataset(path)
    documents = [dataset.documents[number] for number in range(dataset.num_documents)]
    assert [info.path for info in documents] == sorted(info.path for info in documents)
    assert documents[0].token_start == 0
    assert [info.token_start for info in documents[1:]] == [info.token_stop for info in documents[:-1]]
    assert documents[-1].token_stop == dataset.num_tokens
    for info in documents:
        for token in (info.token_start, (info.token_start + info.token_stop) // 2, info.token_stop - 1):
            assert dataset.doc_of(token) == info
    assert (documents[0].source, documents[0].license) == ("texts", "CC0-1.0")
    for bad in (-1, dataset.num_tokens):
        with pytest.raises(IndexError):
            dataset.doc_of(bad)
