"""Never a wrong token: whatever happens to the files, a window is right or raises."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from r1hpc.corpus.build.writer import _read_checksums
from r1hpc.corpus.inspect.verify import verify_dataset
from r1hpc.data.format.errors import DataError, InvalidTokenError, ShardCorruptError, ShardMissingError
from r1hpc.data.format.manifest import file_digest, read_manifest, write_manifest
from r1hpc.data.format.zarr_shard import ShardFile, parse_layout
from r1hpc.data.read.reader import TokenDataset, open_dataset
from tests.corpus.corpus import build

TOKENS = "parts/part-00000/tokens"
WINDOW = 257  # tokens, about four chunks


@pytest.fixture(scope="module", params=["train", "compact"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("corrupt"), profile=request.param).path


@pytest.fixture(scope="module")
def expected(path: Path) -> Any:
    return open_dataset(path).read(0, open_dataset(path).num_tokens).copy()


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(path, tmp_path / "copy"))


def shards(path: Path) -> list[Path]:
    return sorted((path / TOKENS / "c").iterdir(), key=lambda shard: int(shard.name))


def read_windows(dataset: TokenDataset, expected: Any) -> list[ShardCorruptError]:
    """Read everything window by window; the errors met. A wrong token fails the test."""
    errors = []
    for start in range(0, dataset.num_tokens, WINDOW):
        length = min(WINDOW, dataset.num_tokens - start)
        try:
            window = dataset.read(start, length)
        except ShardCorruptError as error:
            errors.append(error)
        else:
            assert np.array_equal(window, expected[start : start + length]), f"wrong tokens at {start}"
    return errors


def flip(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _faults(path: Path) -> Iterator[tuple[Path, bytes]]:
    """Every eighth-or-so bit of the first shard, index and all, then random bits and cuts of all shards."""
    draw = np.random.default_rng(0)
    first = shards(path)[0]
    raw = first.read_bytes()
    for byte in range(len(raw)):
        yield first, flip(raw, 8 * byte + int(draw.integers(8)))
    for _ in range(200):
        shard = shards(path)[int(draw.integers(len(shards(path))))]
        raw = shard.read_bytes()
        yield shard, flip(raw, int(draw.integers(8 * len(raw))))
        yield shard, raw[: int(draw.integers(len(raw)))]


def test_every_fault_of_a_shard_is_detected_on_window_reads(copy: Path, expected: Any) -> None:
    """Every byte of a shard flipped, 200 random flips and 200 truncations, met after a clean open."""
    num_faults = 0
    for shard, bad in _faults(copy):
        good = shard.read_bytes()
        dataset = open_dataset(copy)
        shard.write_bytes(bad)
        errors = read_windows(dataset, expected)
        if not errors:  # only the padding behind the last token can be hit unseen; the audit sees it
            assert shard == shards(copy)[-1]
            assert [problem.file for problem in verify_dataset(dataset.manifest)] == [
                f"{TOKENS}/c/{shard.name}"
            ]
        for error in errors:
            assert str(shard) in str(error)
        shard.write_bytes(good)
        num_faults += 1
    assert num_faults > 500
    assert not read_windows(open_dataset(copy), expected)


@pytest.mark.parametrize("verify", ["once", "every"])
def test_missing_shard_is_named(copy: Path, expected: Any, verify: str) -> None:
    for shard in shards(copy):
        dataset = open_dataset(copy, verify=verify)
        hidden = shard.rename(shard.with_suffix(".hidden"))
        errors = read_windows(dataset, expected)
        assert errors
        assert all(isinstance(error, ShardMissingError) and str(shard) in str(error) for error in errors)
        with pytest.raises(ShardMissingError, match=f"{shard} is missing"):
            open_dataset(copy)
        hidden.rename(shard)


def test_truncated_shard_is_named_at_open(copy: Path) -> None:
    os.truncate(shards(copy)[1], 100)
    with pytest.raises(ShardCorruptError, match="c/1 has 100 bytes, the manifest says"):
        open_dataset(copy)


def test_shard_truncated_after_it_was_verified(copy: Path, expected: Any) -> None:
    dataset = open_dataset(copy)
    dataset.read(0, dataset.num_tokens)
    for shard in shards(copy):
        os.truncate(shard, 10)
    errors = read_windows(dataset, expected)
    assert errors or dataset.manifest.content["recipe"]["profile"] == "compact"  # decoded chunks are kept
    fresh = pickle.loads(pickle.dumps(dataset))
    assert len(read_windows(fresh, expected)) == -(-dataset.num_tokens // WINDOW)


def test_bit_that_flips_after_first_touch_is_seen_by_verify_every(copy: Path, expected: Any) -> None:
    dataset = open_dataset(copy, verify="every")
    assert not read_windows(dataset, expected)
    shard = shards(copy)[0]
    with shard.open("r+b") as file:
        raw = file.read(20)
        file.seek(0)
        file.write(flip(raw, 77))
    assert read_windows(dataset, expected)


def test_shards_that_change_places_are_noticed(copy: Path, expected: Any) -> None:
    """Sound shards with every crc32c right. Raw ones have the right size too: only the record tells."""
    first, second = shards(copy)[:2]
    dataset = open_dataset(copy)
    first.rename(first.with_suffix(".moved"))
    second.rename(first)
    first.with_suffix(".moved").rename(second)
    errors = read_windows(dataset, expected)
    raw = dataset.manifest.content["recipe"]["profile"] == "train"
    assert ("belongs to another dataset or another place" if raw else "the manifest says") in str(errors[0])


def test_shard_of_another_dataset_is_noticed(copy: Path, expected: Any, tmp_path: Path) -> None:
    source = {"name": "texts", "kind": "text", "root": ".", "glob": "docs/0*.txt", "exclude": ["000.txt"]}
    profile = read_manifest(copy).content["recipe"]["profile"]
    other = build(tmp_path / "other", sources=[source], profile=profile).path
    dataset = open_dataset(copy)
    shutil.copy(shards(other)[0], shards(copy)[0])
    assert read_windows(dataset, expected)


def test_replaced_folder_is_another_dataset(copy: Path, tmp_path: Path) -> None:
    dataset_id = open_dataset(copy).id
    shutil.rmtree(copy)
    build(tmp_path / "other", part_bytes=1000).path.rename(copy)
    with pytest.raises(DataError, match=dataset_id):
        open_dataset(copy, expected_id=dataset_id)


@pytest.mark.parametrize("name", ["manifest.json", "dataset_id"])
def test_no_bit_of_the_manifest_may_change(copy: Path, name: str) -> None:
    raw = (copy / name).read_bytes()
    draw = np.random.default_rng(0)
    for byte in range(0, len(raw) - (name == "dataset_id"), 1 if len(raw) < 100 else 7):
        (copy / name).write_bytes(flip(raw, 8 * byte + int(draw.integers(8))))
        with pytest.raises(ShardCorruptError):
            open_dataset(copy)


@pytest.mark.parametrize("name", [f"{TOKENS}/zarr.json", "parts/part-00000/tokens.crc32c"])
def test_no_bit_of_the_metadata_may_change(copy: Path, name: str) -> None:
    raw = (copy / name).read_bytes()
    for byte in range(0, len(raw), 5):
        (copy / name).write_bytes(flip(raw, 8 * byte))
        with pytest.raises(ShardCorruptError, match=name):
            open_dataset(copy)


@pytest.mark.parametrize("name", ["doc_offsets/c/0", "doc_hash/c/0/0", "doc_source/zarr.json", "inputs.json"])
def test_no_bit_of_the_provenance_may_change(copy: Path, name: str) -> None:
    path = copy / "parts/part-00000" / name
    raw = path.read_bytes()
    for byte in range(0, len(raw), 5):
        path.write_bytes(flip(raw, 8 * byte))
        with pytest.raises(ShardCorruptError, match=name):
            open_dataset(copy).doc_of(0)


def test_id_outside_the_vocabulary_never_leaves(copy: Path) -> None:
    """A faulty writer: everything is consistent, but a hole of invalid ids lies among the tokens."""
    array: Any = zarr.open_array(copy / TOKENS, mode="r+")
    array[70:75] = 65_535
    (copy / "parts/part-00000/tokens.crc32c").write_bytes(_read_checksums(copy / TOKENS))
    content = read_manifest(copy).content
    content["files"] = {name: file_digest(copy / name) for name in content["files"]}
    write_manifest(copy, content)
    dataset = open_dataset(copy)
    assert len(dataset.read(0, 64)) == 64
    for _ in range(2):
        with pytest.raises(InvalidTokenError, match=r"chunk 1 holds token id 65535"):
            dataset.read(64, 1)


def test_hole_in_a_shard_is_no_token(tmp_path: Path) -> None:
    """zarr leaves empty chunks out by default, and reads a lost chunk as the fill value."""
    array: Any = zarr.create_array(
        tmp_path / "z", shape=(64,), dtype="uint16", chunks=(16,), shards=(64,), fill_value=65_535,
        compressors=[zarr.codecs.Crc32cCodec()],
    )  # fmt: skip
    array[:32] = 7
    layout = parse_layout(tmp_path / "z", (tmp_path / "z/zarr.json").read_bytes())
    shard = ShardFile(layout, 0, layout.shard_path(0).stat().st_size)
    with pytest.raises(ShardCorruptError, match=r"chunk 2 is not in the shard \(a hole\)"):
        shard.read_chunk(0)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, the manifest says"),
        (lambda path: path.write_bytes(flip(path.read_bytes(), 700)), "sha256 differs"),
    ],
)
def test_audit_names_every_bad_file(copy: Path, spoil: Callable[[Path], object], what: str) -> None:
    manifest = read_manifest(copy)
    assert not list(verify_dataset(manifest))
    for name in manifest.files:
        raw = (copy / name).read_bytes()
        if len(raw) < 88:
            continue
        spoil(copy / name)
        found = list(verify_dataset(manifest))
        assert [problem.file for problem in found] == [name]
        assert what in found[0].what
        (copy / name).write_bytes(raw)


@pytest.mark.parametrize("name", ["../../..", "/etc", "a/../../b"])
@pytest.mark.parametrize("of", ["parts", "files"])
def test_a_manifest_that_names_something_outside_of_its_folder_is_refused(
    copy: Path, name: str, of: str
) -> None:
    content = read_manifest(copy).content
    if of == "parts":
        content["parts"][0]["name"] = name
    else:
        content["files"][name] = {"size": 0, "sha256": ""}
    write_manifest(copy, content)
    with pytest.raises(ShardCorruptError, match="is outside of the folder"):
        read_manifest(copy)
