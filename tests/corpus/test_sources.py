"""Every kind of input gives exactly its documents, in order, each with the place it came from."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.clean.losses import read_counts
from r1hpc.corpus.sources import read, tables
from r1hpc.data.format.manifest import read_manifest
from r1hpc.data.read.reader import TokenDataset, open_dataset
from tests.corpus.corpus import text, write_recipe, write_texts

TEXTS = [text(n, 5 + n) for n in range(40)]
BYTES_IDS = {"kind": "ids", "vocab_size": 100, "eos_id": 0}


def build(folder: Path, source: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> TokenDataset:
    recipe = write_recipe(
        folder,
        sources=[{"name": "a", "root": "."} | source],
        tokenizer=tokenizer or {"kind": "bytes"},
    )
    return open_dataset(build_dataset(recipe, folder / "out").path)


def documents(dataset: TokenDataset) -> list[bytes]:
    """With the bytes tokenizer, a document's ids are its bytes."""
    found = []
    for number in range(dataset.num_documents):
        info = dataset.documents[number]
        ids = dataset.read(info.token_start, info.token_stop - info.token_start)
        assert ids[-1] == dataset.eos_id
        found.append(bytes(ids[:-1].tolist()))
    return found


@pytest.mark.parametrize("span_bytes", [1, 7, 64, 10**6])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_jsonl_spans_share_and_lose_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span_bytes: int, suffix: str
) -> None:
    monkeypatch.setattr(read, "_SPAN_BYTES", span_bytes)
    lines = "".join(
        json.dumps({"id": i, "body": item}) + "\n\n" for i, item in enumerate(TEXTS[:12])
    ).rstrip()
    open_file = gzip.open if suffix.endswith("gz") else open
    with open_file(tmp_path / f"in.{suffix}", "wb") as file:
        file.write(lines.encode())
    dataset = build(tmp_path, {"kind": "jsonl", "glob": f"*.{suffix}", "field": "body"})
    assert documents(dataset) == [item.encode() for item in TEXTS[:12]]
    position = dataset.documents[7].position
    assert json.loads(lines.encode()[position:].split(b"\n")[0])["id"] == 7


def test_jsonl_takes_the_first_documents(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in TEXTS))
    dataset = build(tmp_path, {"kind": "jsonl", "glob": "*.jsonl", "max_documents": 5})
    assert documents(dataset) == [item.encode() for item in TEXTS[:5]]


def test_parquet_row_groups(tmp_path: Path) -> None:
    table = pyarrow.table({"n": range(41), "body": [*TEXTS[:20], None, *TEXTS[20:]]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=7)
    dataset = build(tmp_path, {"kind": "parquet", "glob": "*.parquet", "field": "body"})
    assert documents(dataset) == [item.encode() for item in TEXTS]
    assert [dataset.documents[n].position for n in (19, 20)] == [19, 21]


def test_hdf5_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_SPAN_ROWS", 7)
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("group/body", data=TEXTS, dtype=h5py.string_dtype())
    dataset = build(tmp_path, {"kind": "hdf5", "glob": "*.h5", "field": "group/body"})
    assert documents(dataset) == [item.encode() for item in TEXTS]
    assert dataset.documents[30].position == 30


@pytest.mark.parametrize("layout", ["stream", "rows", "ragged"])
def test_hdf5_token_ids(tmp_path: Path, layout: str) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        if layout == "stream":
            file["ids"] = np.array([5, 6, 0, 7, 0, 0, 8, 9], dtype=np.int64)
        elif layout == "rows":
            file["ids"] = np.array([[5, 6, 0], [7, 0, 0], [8, 9, 0]], dtype=np.uint16)
        else:
            ragged = file.create_dataset("ids", 3, dtype=h5py.vlen_dtype(np.int32))
            for row, ids in enumerate(([5, 6], [7], [8, 9])):
                ragged[row] = ids
    dataset = build(tmp_path, {"kind": "hdf5", "glob": "*.h5", "field": "ids"}, BYTES_IDS)
    assert documents(dataset) == [b"\x05\x06", b"\x07", b"\x08\x09"]
    positions = [dataset.documents[n].position for n in range(3)]
    assert positions == ([0, 3, 6] if layout == "stream" else [0, 1, 2])
    assert dataset.tokenizer_path is None


@pytest.mark.parametrize("field", ["soft", "group/inner", "/group/inner"])
def test_soft_links_of_hdf5_are_followed(tmp_path: Path, field: str) -> None:
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file.create_dataset("deep/body", data=TEXTS, dtype=h5py.string_dtype())
        file["soft"] = h5py.SoftLink("/group/inner")
        file["group"] = h5py.SoftLink("/deep")
        file["deep/inner"] = h5py.SoftLink("body")
    dataset = build(tmp_path, {"kind": "hdf5", "glob": "*.h5", "field": field})
    assert documents(dataset) == [item.encode() for item in TEXTS]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("broken", "no dataset 'broken'; its link cannot be followed; correct the link"),
        ("lost", "no dataset 'lost'; its link cannot be followed"),
        ("circle", "no dataset 'circle'; its link cannot be followed"),
        ("idz", "no dataset 'idz' (did you mean 'ids'?)"),
        ("idz/x", "no dataset 'idz/x'"),
        ("ids/x", "no dataset 'ids/x'"),
        ("linked", "dataset 'linked' lies in another file, "),
        ("folder/ids", "dataset 'folder/ids' lies in another file, "),
        (
            "virtual",
            "dataset 'virtual' lies in another file, gone.h5, which a build does not check for changes",
        ),
        ("raw", "dataset 'raw' lies in another file, raw.bin, "),
    ],
)
def test_data_of_another_hdf5_file_are_refused(tmp_path: Path, field: str, message: str) -> None:
    (tmp_path / "more").mkdir()
    with h5py.File(tmp_path / "more" / "other.h5", "w") as other:
        other["ids"] = np.ones((2, 3), np.int64)
    layout = h5py.VirtualLayout((2, 3), np.int64)
    layout[:] = h5py.VirtualSource("gone.h5", "ids", shape=(2, 3))
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["ids"] = np.ones((2, 3), np.int64)
        file["broken"] = h5py.SoftLink("/nothing")
        file["lost"] = h5py.ExternalLink("more/gone.h5", "ids")
        file["circle"] = h5py.SoftLink("/circle")
        file["linked"] = h5py.ExternalLink("more/other.h5", "ids")
        file["folder"] = h5py.ExternalLink("more/other.h5", "/")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (2, 3), np.int64, external=[("raw.bin", 0, 48)])
    with pytest.raises(UsageError) as error:
        build(tmp_path, {"kind": "hdf5", "glob": "*.h5", "field": field}, BYTES_IDS)
    assert f"in.h5: {message}" in str(error.value)


def _hdf5(folder: Path, values: Any) -> None:
    with h5py.File(folder / "in.h5", "w") as file:
        file["body"] = values


@pytest.mark.parametrize(
    ("values", "field", "tokenizer", "message"),
    [
        (np.zeros(3, np.float32), "body", None, "dtype float32"),
        (np.zeros((2, 2, 2), np.int32), "body", BYTES_IDS, "3 dimensions"),
        (np.array([1, 100]), "body", BYTES_IDS, "token id 100 is outside the vocabulary of 100"),
        (np.array([1, -1]), "body", BYTES_IDS, "token ids must lie between"),
        (np.array([1, 2]), "bodi", BYTES_IDS, "did you mean 'body'?"),
        ([b"some text"], "body", BYTES_IDS, "the inputs are text"),
    ],
)
def test_wrong_hdf5_is_refused(
    tmp_path: Path, values: Any, field: str, tokenizer: dict[str, Any] | None, message: str
) -> None:
    _hdf5(tmp_path, values)
    with pytest.raises(UsageError) as error:
        build(tmp_path, {"kind": "hdf5", "glob": "*.h5", "field": field}, tokenizer)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"WARC/1.0\r\nWARC-Type: response\r\n\r\nHTTP/1.1 200 OK\r\n", "a WARC archive, not text"),
        (b"plain\0text", "holds NUL bytes, so it is binary or UTF-16; exclude it, or convert it to UTF-8"),
        ("words".encode("utf-16-le"), "holds NUL bytes"),
    ],
)
def test_a_file_that_is_no_plain_text_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a").write_text("words")
    (tmp_path / "b").write_bytes(raw)
    source = {"name": "a", "kind": "text", "root": ".", "glob": "[ab]"}
    with pytest.raises(UsageError) as error:
        build(tmp_path, source)
    assert message in str(error.value)
    assert f"{tmp_path / 'b'}" in str(error.value)
    recipe = write_recipe(tmp_path, sources=[source], max_unreadable=0.99)
    (count,) = read_counts(read_manifest(build_dataset(recipe, tmp_path / "out").path)).values()
    assert count.records["documents"] == {"in": 2, "kept": 1, "dropped": {"unreadable": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"texxt": "a"}', "no field 'text' (did you mean 'texxt'?)"),
        (b'{"text": 3}', "is int, not a string"),
        (b'{"text": ', "not JSON"),
        (b'["text"]', "no field 'text'"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
    ],
)
def test_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UsageError) as error:
        build(tmp_path, {"kind": "jsonl", "glob": "*.jsonl"})
    assert message in str(error.value)
    assert "in.jsonl" in str(error.value)
    assert " 17" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"), [("parquet", "cannot be read as Parquet"), ("hdf5", "cannot be read as HDF5")]
)
def test_file_of_another_format(tmp_path: Path, kind: str, message: str) -> None:
    (tmp_path / "in.bin").write_bytes(b"neither of the two")
    with pytest.raises(UsageError, match=message):
        build(tmp_path, {"kind": kind, "glob": "*.bin"})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"root": "nowhere"}, "is not a folder"),
        ({"glob": "*.none"}, "matches"),
        ({"max_bytes": 1}, "smaller than every file"),
        ({"glob": "empty.txt"}, r"inputs are empty: no documents in any source \(.*: empty.txt in /"),
    ],
)
def test_empty_inputs(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    write_texts(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match=message):
        build(tmp_path, {"kind": "text", "glob": "docs/*.txt"} | source)


def test_globs_exclusions_and_limits(tmp_path: Path) -> None:
    for name in ("top.py", "a/one.py", "a/b/two.py", "tests/no.py", ".hidden/no.py", "a/three.txt"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(name)
    source = {"kind": "text", "root": "t", "glob": "**/*.py", "exclude": ["tests"]}
    assert documents(build(tmp_path, source)) == [b"a/b/two.py", b"a/one.py", b"top.py"]


@pytest.mark.parametrize("glob", ["a/**/*.py", "**/a/**/*.py", "a/**/**/*.py"])
def test_two_stars_are_any_number_of_folders_also_none(tmp_path: Path, glob: str) -> None:
    for name in ("top.py", "a/one.py", "a/b/two.py", "ba/no.py"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text(name)
    found = documents(build(tmp_path, {"kind": "text", "root": "t", "glob": glob}))
    assert found == [b"a/b/two.py", b"a/one.py"]


def test_one_star_does_not_enter_folders(tmp_path: Path) -> None:
    write_texts(tmp_path / "t", 2)
    (tmp_path / "t" / "top.txt").write_text("top")
    assert documents(build(tmp_path, {"kind": "text", "root": "t", "glob": "*.txt"})) == [b"top"]


def below(root: Path, names: str, glob: str, exclude: Sequence[str] = ()) -> str:
    """Which of the files are taken, once they are there."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return " ".join(sorted(read.files_below(root, glob, read.Excluded(exclude))))


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/train*.jsonl", "train-1.jsonl x/train-0.jsonl"),
        ("**/wiki*/*.jsonl", "wiki/a.jsonl"),
        ("wiki/**", "wiki/a.jsonl wiki/b/c.jsonl"),
        ("w**.jsonl", "wiki/a.jsonl wiki/b/c.jsonl"),
        ("**/[tw]?*/?.jsonl", "wiki/a.jsonl"),
    ],
)
def test_stars_stay_within_a_name_beside_two_stars_too(tmp_path: Path, glob: str, expected: str) -> None:
    names = "train-1.jsonl x/train-0.jsonl x/train/eval.jsonl wiki/a.jsonl wiki/b/c.jsonl"
    assert below(tmp_path, names, glob) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("*.test.jsonl", "a.jsonl data/test/c.jsonl test"),
        ("test", "a.jsonl b.test.jsonl"),
        ("test/", "a.jsonl b.test.jsonl test"),
        ("data/test", "a.jsonl b.test.jsonl test"),
        ("**/c.*", "a.jsonl b.test.jsonl test"),
        ("data/*", "a.jsonl b.test.jsonl test"),
    ],
)
def test_exclude_takes_names_patterns_and_paths(tmp_path: Path, exclude: str, expected: str) -> None:
    names = "a.jsonl b.test.jsonl data/test/c.jsonl test"
    assert below(tmp_path, names, "**/*", [exclude]) == expected


def test_a_name_with_brackets_is_excluded_as_it_stands(tmp_path: Path) -> None:
    assert below(tmp_path, "a[1].txt a1.txt", "*", ["a[1].txt"]) == ""
    assert below(tmp_path / "b", "a[1].txt b.txt", "*", ["a[[]1].txt"]) == "b.txt"


def test_an_exclusion_that_leaves_nothing_out_is_refused(tmp_path: Path) -> None:
    write_texts(tmp_path, 2)
    source = {"kind": "text", "root": "docs", "exclude": ["000.txt", ".git", "tets"]}
    with pytest.raises(UsageError, match="exclude 'tets' leaves out nothing under"):
        build(tmp_path, source)


@pytest.mark.parametrize(
    ("policy", "expected"), [("skip", [b"good"]), ("replace", ["\ufffdbad".encode(), b"good"])]
)
def test_text_that_is_not_utf8(tmp_path: Path, policy: str, expected: list[bytes]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xffbad")
    (tmp_path / "b.txt").write_bytes(b"good")
    source = {"kind": "text", "glob": "*.txt"}
    with pytest.raises(UsageError, match=r"a\.txt.*on_invalid_utf8: skip or replace"):
        build(tmp_path, source)
    dataset = build(tmp_path, source | {"on_invalid_utf8": policy})
    assert documents(dataset) == expected
    assert dataset.manifest.content["sources"][0]["num_skipped"] == (1 if policy == "skip" else 0)
