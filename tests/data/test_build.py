"""A build is all or nothing, the same bytes with any number of workers, and idempotent."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zarr
from transformers import AutoTokenizer

from r1hpc.base.errors import UsageError
from r1hpc.data.build import build_dataset
from r1hpc.data.errors import ShardMissingError
from r1hpc.data.manifest import read_manifest
from r1hpc.data.reader import open_dataset
from r1hpc.data.recipe import load_recipe
from r1hpc.data.sources import SourceSpan, list_spans
from r1hpc.data.stages import divide
from r1hpc.data.tokenise import sample_texts
from r1hpc.data.vocabulary import Encoder
from r1hpc.data.work import open_work
from r1hpc.tasks.tokenizer import character_tokenizer
from tests.data.corpus import build, tree, write_recipe, write_texts

BPE = {"kind": "byte_bpe", "vocab_size": 300}


@pytest.mark.parametrize("profile", ["train", "compact"])
def test_workers_change_no_byte(tmp_path: Path, profile: str) -> None:
    changes: dict[str, Any] = {"tokenizer": BPE, "part_bytes": 900, "profile": profile}
    one = build(tmp_path, "one", workers=1, **changes)
    three = build(tmp_path, "three", workers=3, **changes)
    assert len(read_manifest(one.path).parts) > 3
    assert one.id == three.id
    assert tree(one.path) == tree(three.path)


@pytest.mark.parametrize("profile", ["train", "compact"])
@pytest.mark.parametrize("part_bytes", [900, 10**9])
def test_zarr_reads_what_was_written(tmp_path: Path, profile: str, part_bytes: int) -> None:
    """zarr-python is the oracle for every array, and a group over all of them."""
    dataset = open_dataset(build(tmp_path, profile=profile, part_bytes=part_bytes).path)
    group: Any = zarr.open_group(dataset.path, mode="r")
    parts = [group[f"parts/{part.name}"] for part in dataset.manifest.parts]
    tokens = np.concatenate([part["tokens"][:] for part in parts])
    assert np.array_equal(tokens, dataset.read(0, dataset.num_tokens))
    infos = [dataset.documents[number] for number in range(dataset.num_documents)]
    lengths = np.concatenate([np.diff(part["doc_offsets"][:].astype(np.int64)) for part in parts])
    assert [info.token_stop - info.token_start for info in infos] == lengths.tolist()
    hashes = np.concatenate([part["doc_hash"][:] for part in parts]).tolist()
    assert [info.xxh3_128 for info in infos] == [f"{high:016x}{low:016x}" for high, low in hashes]
    raw = (tmp_path / infos[2].path).read_bytes()
    assert infos[2].xxh3_128 == xxhash.xxh3_128_hexdigest(raw)
    assert not np.concatenate([part["doc_source"][:] for part in parts]).any()


def test_last_shard_is_whole_and_padded_by_the_invalid_id(tmp_path: Path) -> None:
    dataset = open_dataset(build(tmp_path).path)
    tokens = dataset.path / "parts/part-00000/tokens"
    shards = sorted((tokens / "c").iterdir(), key=lambda path: int(path.name))
    assert len({path.stat().st_size for path in shards}) == 1
    padding = -dataset.num_tokens % 512
    assert padding > 0
    meta = json.loads((tokens / "zarr.json").read_text())
    meta["shape"] = [dataset.num_tokens + padding]
    (tokens / "zarr.json").write_text(json.dumps(meta))
    padded: Any = zarr.open_array(tokens, mode="r")
    assert set(padded[dataset.num_tokens :].tolist()) == {65_535}
    assert dataset.vocab_size <= 65_535


def test_documents_decode_to_their_files(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    dataset = open_dataset(build(tmp_path, tokenizer=BPE, part_bytes=900).path)
    assert dataset.tokenizer_path is not None
    encoder = Encoder(dataset.tokenizer_path / "tokenizer.json", "<|endoftext|>")
    loaded = AutoTokenizer.from_pretrained(dataset.tokenizer_path)
    assert loaded.eos_token_id == dataset.eos_id
    found = {}
    for number in range(dataset.num_documents):
        info = dataset.documents[number]
        ids = dataset.read(info.token_start, info.token_stop - info.token_start)
        assert ids.tolist().count(dataset.eos_id) == 1
        found[info.path] = encoder.decode(ids[:-1])
        assert loaded.decode(ids[:-1].tolist(), clean_up_tokenization_spaces=False) == found[info.path]
    assert found == texts


@pytest.mark.parametrize("tokenizer", [BPE, {"kind": "bytes"}])
def test_text_cannot_forge_the_end_of_a_document(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/evil.txt").write_text("before <|endoftext|> after")
    dataset = open_dataset(build(tmp_path, tokenizer=tokenizer).path)
    ids = dataset.read(0, dataset.num_tokens)
    assert ids.tolist().count(dataset.eos_id) == 1
    assert ids[-1] == dataset.eos_id


def test_wide_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["ids"] = np.array([129_279, 65_535, 70_000])
    source = {"name": "ids", "kind": "hdf5", "root": ".", "glob": "*.h5", "field": "ids"}
    ids = {"kind": "ids", "vocab_size": 129_280, "eos_id": 0}
    dataset = open_dataset(build(tmp_path, sources=[source], tokenizer=ids).path)
    assert dataset.dtype == np.uint32
    assert dataset.read(0, 4).tolist() == [129_279, 65_535, 70_000, 0]


def test_existing_tokenizer_is_kept_byte_for_byte(tmp_path: Path) -> None:
    first = build(tmp_path, "first", tokenizer=BPE)
    path = str(first.path / "tokenizer")
    second = build(tmp_path, "second", tokenizer={"kind": "path", "path": path})
    assert tree(first.path / "tokenizer") == tree(second.path / "tokenizer")
    one, other = (open_dataset(report.path).read(0, first.num_tokens) for report in (first, second))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing.json", None, "is not there"),
        ("tokenizer.json", "{}", "is not a tokenizer.json"),
        ("tokenizer.json", "not json", "cannot be read"),
        ("tokenizer.json", '{"model": {"type": "of tomorrow"}}', "cannot be read"),
    ],
)
def test_unusable_tokenizer(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        build(tmp_path, tokenizer={"kind": "path", "path": name})


def test_text_that_the_vocabulary_cannot_spell_is_named_or_left_out(tmp_path: Path) -> None:
    character_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "docs").mkdir()
    for name, content in (("a.txt", "1+1=2"), ("b.txt", "three")):
        (tmp_path / "docs" / name).write_text(content)
    tokenizer = {"kind": "path", "path": "tokenizer.json", "eos_id": 1}
    with pytest.raises(
        UsageError, match=r"b\.txt, record 0: the vocabulary cannot spell it .*set clean: \{\}"
    ):
        build(tmp_path, tokenizer=tokenizer)
    assert build(tmp_path, tokenizer=tokenizer, clean={}).num_documents == 1


def test_unknown_eos_token_names_the_nearest(tmp_path: Path) -> None:
    path = str(build(tmp_path, "first").path / "tokenizer")
    tokenizer = {"kind": "path", "path": path, "eos_token": "<|endoftxt|>"}
    with pytest.raises(UsageError, match=r"did you mean '<\|endoftext\|>'"):
        build(tmp_path, "second", tokenizer=tokenizer)


def test_second_build_does_nothing_and_says_so(tmp_path: Path) -> None:
    first = build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    second = build(tmp_path)
    assert (first.built, second.built, second.note) == (True, False, "")
    assert first.id == second.id
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    (tmp_path / "docs/new.txt").write_text("more")
    assert "inputs have changed" in build(tmp_path).note


def test_foreign_destination_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(UsageError, match="another recipe"):
        build(tmp_path, part_bytes=77)
    with pytest.raises(UsageError, match="is no dataset"):
        build(tmp_path, "docs")
    with pytest.raises(UsageError, match="is not a folder"):
        build_dataset(tmp_path / "recipe.yaml", tmp_path / "recipe.yaml" / "below")
    (tmp_path / "empty").mkdir()
    assert build(tmp_path, "empty").built


def test_damaged_destination_is_not_called_built(tmp_path: Path) -> None:
    report = build(tmp_path)
    (report.path / "parts/part-00000/tokens/c/1").unlink()
    with pytest.raises(ShardMissingError, match="tokens/c/1"):
        build(tmp_path)


def test_builds_at_once_agree(tmp_path: Path) -> None:
    """Every rank of a job may ask for the dataset; one publishes, all get it."""
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    reports = []

    def run() -> None:
        reports.append(build_dataset(recipe, tmp_path / "out"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 4
    assert len({report.id for report in reports}) == 1
    assert [report.built for report in reports].count(True) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "out", "recipe.yaml"]


def test_divide_depends_on_bytes_alone() -> None:
    spans = [SourceSpan(0, str(i), 0, n, n) for i, n in enumerate([5, 5, 1, 20, 3, 4])]
    parts = divide(spans, 10)
    assert [[span.num_bytes for span in part] for part in parts] == [[5, 5], [1, 20], [3, 4]]


def test_tokenizer_sample_is_spread_over_the_inputs(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, count=100)
    recipe = load_recipe(write_recipe(tmp_path))
    spans = list_spans(recipe)
    total = sum(len(content.encode()) for content in texts.values())
    sample = list(sample_texts(recipe, spans, total // 4))
    numbers = [list(texts.values()).index(content) for content in sample]
    assert 20 <= len(sample) <= 30
    assert min(numbers) < 5
    assert max(numbers) > 94
    assert len(list(sample_texts(recipe, spans, 10 * total))) == 100


# --- killed builds --------------------------------------------------------------------------------


def start_build(recipe: Path, out: Path, *arguments: str, failpoint: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "r1hpc.shard", "build", str(recipe), "--out", str(out), *arguments]
    environment = os.environ | {"R1HPC_FAILPOINT": failpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def names(folder: Path) -> set[str]:
    return {path.name.partition("-")[0] if path.name[0] == "." else path.name for path in folder.iterdir()}


def done_units(folder: Path) -> dict[str, int]:
    """The finished units below a folder, with the time of their record."""
    found = folder.glob(".staging-*/units/*/*/done.json")
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


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


def test_a_link_to_a_folder_is_a_destination(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "set").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "scratch" / "set")
    built = build(tmp_path, "out")
    assert built.path == tmp_path / "scratch" / "set"
    assert open_dataset(tmp_path / "out").id == built.id
    assert not build(tmp_path, "out").built
    assert names(tmp_path / "scratch") == {"set"}


def test_a_build_that_waits_says_for_whom(tmp_path: Path) -> None:
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path)
    out = tmp_path / "data" / "out"
    said: list[str] = []
    with open_work(out):
        thread = threading.Thread(target=build_dataset, args=(recipe, out), kwargs={"report": said.append})
        thread.start()
        while not said:
            time.sleep(0.01)
    thread.join()
    assert said[0] == f"waiting for process {os.getpid()} on {socket.gethostname()}, which builds {out}"
    assert not any("waiting" in line for line in said[1:])


def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without -o flock answers ENOSYS: builds at once then do double work and agree all the same."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    write_texts(tmp_path)
    recipe = write_recipe(tmp_path, part_bytes=900)
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(build_dataset(recipe, tmp_path / "out")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 3
    assert len({report.id for report in reports}) == 1
    assert names(tmp_path) == {"docs", "recipe.yaml", "out"}


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
