"""Traces keep their roles: what goes in as prompt and completion comes out as such, or not at all."""

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1hpc.base.errors import UsageError
from r1hpc.corpus.build.build import build_dataset
from r1hpc.corpus.inspect.verify import verify_dataset
from r1hpc.corpus.recipe import parse_recipe
from r1hpc.corpus.sources import read
from r1hpc.data.format.errors import DataError, DatasetMismatchError, ShardCorruptError
from r1hpc.data.format.manifest import file_digest, read_manifest, write_manifest
from r1hpc.data.read.sft_documents import TraceDataset, open_traces
from r1hpc.data.read.sft_loader import TraceLoader
from r1hpc.shard import main
from tests.corpus.corpus import build, write_recipe
from tests.corpus.tracefiles import Pair, build_traces, expected_ids, pairs, trace_source, write_traces

PART = "parts/part-00000"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def documents(dataset: TraceDataset) -> list[tuple[list[int], int]]:
    found = [dataset.read_document(number) for number in range(dataset.num_documents)]
    return [(tokens.tolist(), num_prompt_tokens) for tokens, num_prompt_tokens in found]


@pytest.mark.parametrize("profile", ["train", "compact"])
@pytest.mark.parametrize("verify", ["once", "every"])
def test_round_trip(tmp_path: Path, profile: str, verify: str) -> None:
    traces = pairs(60)
    dataset = open_traces(build_traces(tmp_path, traces, profile=profile).path, verify=verify)
    expected = [expected_ids(trace) for trace in traces]
    assert documents(dataset) == expected
    assert dataset.read_document(3)[0].dtype == np.uint32
    assert dataset.document_lengths.tolist() == [len(ids) for ids, _ in expected]
    assert dataset.prompt_lengths.tolist() == [num_prompt_tokens for _, num_prompt_tokens in expected]
    for bad in (-1, 60):
        with pytest.raises(IndexError, match="outside"):
            dataset.read_document(bad)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(traces=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=20), part_bytes=st.integers(1, 200))
def test_any_text_survives(tmp_path: Path, traces: list[Pair], part_bytes: int) -> None:
    shutil.rmtree(tmp_path / "dataset", ignore_errors=True)
    report = build_traces(tmp_path, traces, part_bytes=part_bytes)
    assert documents(open_traces(report.path)) == [expected_ids(trace) for trace in traces]


@pytest.mark.parametrize("span_bytes", [1, 50, 10**6])
def test_parts_and_workers_change_no_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, span_bytes: int
) -> None:
    monkeypatch.setattr(read, "_SPAN_BYTES", span_bytes)
    traces = pairs(20)
    for name, part in (("a", traces[:8]), ("b", traces[8:])):
        write_traces(tmp_path / f"{name}.jsonl", part, reward=1.0)
    recipe = write_recipe(tmp_path, sources=[trace_source()], part_bytes=100)
    dataset = open_traces(build_dataset(recipe, tmp_path / "out").path)
    assert documents(dataset) == [expected_ids(trace) for trace in traces]
    assert len(dataset.tokens.manifest.parts) > 1
    info = dataset.tokens.documents[9]
    line = (tmp_path / info.path).read_bytes()[info.position :].split(b"\n")[0]
    assert (info.path, json.loads(line)["completion"]) == ("b.jsonl", traces[9][1])


def test_zarr_reads_the_roles(tmp_path: Path) -> None:
    traces = pairs(30)
    group: Any = zarr.open_group(build_traces(tmp_path, traces).path / PART, mode="r")
    offsets, roles = group["seg_offsets"][:].tolist(), group["seg_role"][:].tolist()
    tokens = group["tokens"][:].tolist()
    segments = [tokens[a:b] for a, b in itertools.pairwise(offsets)]
    assert roles == [0, 1] * 30
    for number, (prompt, completion) in enumerate(traces):
        assert segments[2 * number] == list(prompt.encode())
        assert segments[2 * number + 1] == [*completion.encode(), 256]


# --- tokenizers -----------------------------------------------------------------------------------


def character_file(folder: Path) -> Path:
    """A tokenizer.json with a special token, an added one and no unknown token."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<eos>", "<think>", *"0123+="])})
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(["<eos>", "<think>"])
    tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def build_characters(folder: Path, traces: list[Pair], **changes: Any) -> TraceDataset:
    character_file(folder)
    tokenizer = {"kind": "path", "path": "tokenizer.json", "eos_id": 0}
    read = [trace_source(**changes)]
    return open_traces(build_traces(folder, traces, tokenizer=tokenizer, sources=read).path)


def test_tokens_that_a_template_spells_are_meant(tmp_path: Path) -> None:
    dataset = build_characters(tmp_path, [("1+2=", "<think>1</think>3"), ("<eos>3=", "3")])
    assert documents(dataset) == [([3, 6, 4, 7, 1, 3, 8, 5, 0], 4), ([0, 5, 7, 5, 0], 3)]
    assert dataset.eos_id == 0


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (("1+x=", "3"), r"cannot spell the prompt \(WordLevel error"),
        (("1+2=", "three"), r"cannot spell the completion \(WordLevel error"),
        (("1+2=", "3<eos>"), "holds the EOS token, which the build appends"),
    ],
)
def test_trace_that_the_tokenizer_cannot_take(tmp_path: Path, trace: Pair, message: str) -> None:
    with pytest.raises(UsageError, match=rf"a\.jsonl:2: .*{message}"):
        build_characters(tmp_path, [("1=", "1"), trace, ("2=", "2")])
    dataset = build_characters(tmp_path, [("1=", "1"), trace, ("2=", "2")], on_invalid="skip")
    assert documents(dataset) == [([3, 7, 3, 0], 2), ([4, 7, 4, 0], 2)]
    assert dataset.tokens.manifest.content["sources"][0]["num_skipped"] == 1


def test_eos_id_must_be_a_token(tmp_path: Path) -> None:
    character_file(tmp_path)
    tokenizer = {"kind": "path", "path": "tokenizer.json", "eos_id": 77}
    with pytest.raises(UsageError, match=r"tokenizer\.json has no token of id 77"):
        build_traces(tmp_path, pairs(2), tokenizer=tokenizer)


# --- lines that are no traces ---------------------------------------------------------------------

BAD_LINES = [
    (b'{"completion": "x"}', "no field 'prompt'"),
    (b'{"promt": "x", "completion": "x"}', r"no field 'prompt' \(did you mean 'promt'\?\)"),
    (b'{"prompt": "x"}', "no field 'completion'"),
    (b'{"prompt": "", "completion": "x"}', "field 'prompt' is empty"),
    (b'{"prompt": "x", "completion": ""}', "field 'completion' is empty"),
    (b'{"prompt": 7, "completion": "x"}', "field 'prompt' is int, not a string"),
    (b'{"prompt": "x", "completion": null}', "field 'completion' is NoneType"),
    (b'{"prompt": "x", "completion": ["x"]}', "field 'completion' is list"),
    (b'["x", "y"]', "a JSON list, not an object"),
    (b'{"prompt": "x", "completion": "x"', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"prompt": "x", "completion": "\xff"}', "not UTF-8"),
    (b'{"prompt": "\\ud800", "completion": "x"}', "field 'prompt' is not UTF-8"),
    (b'{"prompt": "x", "completion": "\xed\xa0\x80"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("span_bytes", [5, 10**6])
def test_invalid_line_is_named_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str, span_bytes: int
) -> None:
    if len(line) < 1000:
        monkeypatch.setattr(read, "_SPAN_BYTES", span_bytes)
    good = [json.dumps({"prompt": p, "completion": c}).encode() for p, c in pairs(4)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:2], b"", line, *good[2:]]))
    with pytest.raises(UsageError, match=rf"a\.jsonl:4: {message}.*on_invalid: skip"):
        build_dataset(write_recipe(tmp_path, sources=[trace_source()]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe = write_recipe(tmp_path, sources=[trace_source(on_invalid="skip")])
    dataset = open_traces(build_dataset(recipe, tmp_path / "out").path)
    assert documents(dataset) == [expected_ids(trace) for trace in pairs(4)]
    assert dataset.tokens.manifest.content["sources"][0]["num_skipped"] == 1


def test_nothing_but_invalid_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n[]\n")
    recipe = write_recipe(tmp_path, sources=[trace_source(on_invalid="skip")])
    with pytest.raises(DataError, match=r"source traces: 2 of 2 records are dropped \(2 no_trace\)"):
        build_dataset(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": [trace_source(field="text")]}, None),
        ({"sources": [trace_source(field="body")]}, "field is not for kind: traces"),
        ({"sources": [trace_source(on_invalid_utf8="skip")]}, "on_invalid_utf8 is not for kind: traces"),
        ({"sources": [trace_source(kind="jsonl", on_invalid="skip")]}, "on_invalid is not for kind: jsonl"),
        ({"sources": [trace_source(on_invalid="replace")]}, "must be one of error, skip"),
        ({"sources": [trace_source(), trace_source(name="b", kind="text")]}, "do not mix"),
        ({"tokenizer": {"kind": "ids", "vocab_size": 5, "eos_id": 0}}, "traces are text"),
        ({"tokenizer": {"kind": "bytes", "eos_id": 0}}, "eos_id is not for kind: bytes"),
        ({"tokenizer": {"kind": "path", "path": "x", "eos_id": -1}}, "must be a token id"),
    ],
)
def test_recipe_of_traces(changes: dict[str, Any], message: str | None) -> None:
    content = {"name": "x", "tokenizer": {"kind": "bytes"}, "sources": [trace_source()]} | changes
    if message is None:
        assert parse_recipe(content, Path()).is_traces
        return
    with pytest.raises(UsageError, match=message):
        parse_recipe(content, Path())


def test_keys_of_traces_do_not_rename_other_datasets(tmp_path: Path) -> None:
    """Datasets built before traces existed are still found to be their recipe's."""
    content = read_manifest(build(tmp_path).path).content["recipe"]["sources"][0]
    assert not {"prompt_field", "completion_field", "on_invalid"} & set(content)


# --- the wrong dataset, or a damaged one ----------------------------------------------------------


def test_dataset_without_roles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="documents without roles"):
        open_traces(build(tmp_path).path)


def test_a_pickled_copy_has_the_same_documents(tmp_path: Path) -> None:
    dataset = open_traces(build_traces(tmp_path, pairs(20)).path, verify="every")
    copy = pickle.loads(pickle.dumps(dataset))
    assert (copy.id, copy.tokens.verify) == (dataset.id, "every")
    assert documents(copy) == documents(dataset)
    assert not copy.document_lengths.flags.writeable


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    dataset = open_traces(build_traces(tmp_path, pairs(5)).path)
    with pytest.raises(DatasetMismatchError):
        open_traces(dataset.path, expected_id="0" * 64)


@pytest.mark.parametrize("name", ["seg_offsets/c/0", "seg_role/c/0", "doc_offsets/c/0", "seg_role/zarr.json"])
def test_no_bit_of_the_roles_may_change(tmp_path: Path, name: str) -> None:
    path = build_traces(tmp_path, pairs(30)).path
    file = path / PART / name
    raw = file.read_bytes()
    for byte in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[byte] ^= 1 << byte % 8
        file.write_bytes(changed)
        with pytest.raises(ShardCorruptError, match=name):
            open_traces(path)
    assert [problem.file for problem in verify_dataset(read_manifest(path))] == [f"{PART}/{name}"]


@pytest.mark.parametrize("profile", ["train", "compact"])
@pytest.mark.parametrize("verify", ["once", "every"])
def test_flipped_token_is_never_returned(tmp_path: Path, profile: str, verify: str) -> None:
    traces = pairs(60)
    path = build_traces(tmp_path, traces, profile=profile).path
    shard = path / PART / "tokens/c/0"
    raw = shard.read_bytes()
    draw = np.random.default_rng(0)
    for bit in draw.integers(0, 8 * len(raw), 40).tolist():
        dataset = open_traces(path, verify=verify)
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(changed)
        errors = []
        for number, trace in enumerate(traces):
            try:
                tokens, num_prompt_tokens = dataset.read_document(number)
            except ShardCorruptError as error:
                errors.append(str(error))
            else:
                assert (tokens.tolist(), num_prompt_tokens) == expected_ids(trace)
        assert errors
        assert all(str(shard) in error for error in errors)
        shard.write_bytes(raw)


def _publish_again(path: Path) -> None:
    """Make the manifest agree with the files as they are: what a faulty writer would have published."""
    content = read_manifest(path).content
    content["files"] = {name: file_digest(path / name) for name in content["files"]}
    write_manifest(path, content)


@pytest.mark.parametrize(
    ("array", "index", "value", "message"),
    [
        ("seg_role", 3, 0, "do not divide each document"),
        ("seg_role", 3, 4, r"roles \[4\], which this version does not know"),
        ("seg_offsets", 3, 0, "do not divide each document"),
        ("seg_offsets", 4, 7, "do not divide each document"),
        ("doc_offsets", 2, 1, "do not divide each document"),
    ],
)
def test_roles_that_contradict_the_documents(
    tmp_path: Path, array: str, index: int, value: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = build_traces(tmp_path, pairs(9)).path
    values: Any = zarr.open_array(path / PART / array, mode="r+")
    values[index] = value
    _publish_again(path)
    with pytest.raises(DataError, match=message):
        open_traces(path)
    assert main(["verify", str(path)]) == 1
    assert f"BAD  {PART}/seg_role" in capsys.readouterr().out


# --- the command -------------------------------------------------------------------------------------


def test_inspect_shows_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(build_traces(tmp_path, [("ab", "xyz"), ("abc", "\x1b[31mred")]).path)
    assert main(["verify", path]) == 0
    capsys.readouterr()
    assert main(["inspect", path, "--doc", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["roles"] == {"prompt": 5, "completion": 3 + 8 + 2, "longest_document": 12}
    assert (found["document"]["prompt"], found["document"]["completion"]) == ("ab", "xyz")
    assert main(["inspect", path, "--doc", "1"]) == 0
    shown = capsys.readouterr().out
    for part in ("5 prompt tokens, 13 of completions", "prompt: abc", "red", "12 tokens with its EOS"):
        assert part in shown
    assert "\x1b" not in shown


def test_trace_leads_from_a_sample_to_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = pairs(20)
    dataset = open_traces(build_traces(tmp_path, traces).path)
    reading = TraceLoader(
        dataset, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1, seed=9, pad_id=0, seq_len=64
    )
    batch = reading.batch(4)
    assert main(["trace", str(dataset.path), "--seed", "9", "--sample", "35", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (info,) = found["documents"]
    assert (found["epoch"], found["plan_hash"]) == (1, reading.order_id(reading.plan))
    assert info["number"] == batch.document_ids[3]
    line = (tmp_path / info["path"]).read_bytes()[info["position"] :].split(b"\n")[0]
    assert json.loads(line)["prompt"] == traces[info["number"]][0]
    assert main(["trace", str(dataset.path), "--sample", "35"]) == 0
    assert "a.jsonl at" in capsys.readouterr().out
