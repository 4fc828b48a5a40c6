"""What a build writes: the same bytes with any number of workers, every document whole, read by zarr too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zarr
from transformers import AutoTokenizer

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.stages import divide
from r1hpc.corpus.build.tokenize import sample_texts
from r1hpc.corpus.build.vocabulary import Encoder
from r1hpc.corpus.recipe import load_recipe
from r1hpc.corpus.sources.fields import SourceSpan
from r1hpc.corpus.sources.read import list_spans
from r1hpc.data.format.manifest import read_manifest
from r1hpc.data.read.reader import open_dataset
from r1hpc.tasks.text.tokenizer import character_tokenizer
from tests.corpus.builds import BPE
from tests.corpus.corpus import build, tree, write_recipe, write_texts


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


@pytest.mark.slow
def test_small_parts_take_no_whole_shard_each(tmp_path: Path) -> None:
    write_texts(tmp_path, 30)
    sizes: dict[str, Any] = {"part_bytes": 1, "chunk_tokens": 2**15, "shard_tokens": 2**24}
    dataset = open_dataset(build(tmp_path, **sizes).path)
    assert len(dataset.manifest.parts) == 30
    assert sum(len(content) for content in tree(dataset.path).values()) <= 40_000_000


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


def test_divide_depends_on_bytes_alone() -> None:
    spans = [SourceSpan(0, str(i), 0, n, n) for i, n in enumerate([5, 5, 1, 20, 3, 4])]
    parts = divide(spans, 10)
    assert [[span.num_bytes for span in part] for part in parts] == [[5, 5], [1, 20], [3, 4]]


def test_tokenizer_sample_is_spread_over_the_inputs(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, count=100)
    recipe = load_recipe(write_recipe(tmp_path))
    spans = list_spans(recipe)
    total = sum(len(content.encode()) for content in texts.values())
    sample = [str(content) for content in sample_texts(recipe, spans, total // 4)]
    numbers = [list(texts.values()).index(content) for content in sample]
    assert 20 <= len(sample) <= 30
    assert min(numbers) < 5
    assert max(numbers) > 94
    assert len(list(sample_texts(recipe, spans, 10 * total))) == 100
