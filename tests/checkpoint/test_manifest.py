"""The manifest survives a round trip, notices any flipped bit, and lists only safe names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1hpc.base.errors import StateError
from r1hpc.checkpoint.manifest import FileRecord, Manifest, decode, digest_bytes, encode, step_folder, step_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RECORD = FileRecord("zero/rank_0.pt", 81, digest_bytes(b"x"))
PATH = Path("/run/checkpoints/step-00000120/manifest.json")


def manifest(**changes: Any) -> Manifest:
    return Manifest(
        **{"step": 120, "attempt": 3, "created": 1.5, "files": (RECORD,), "meta": {"epoch": 1}, **changes}
    )


@given(meta=st.dictionaries(st.text(), JSON, max_size=4), step=st.integers(0, 10**12))
def test_round_trip(meta: dict[str, Any], step: int) -> None:
    assert decode(encode(manifest(meta=meta, step=step)), PATH) == manifest(meta=meta, step=step)


def test_number_keys_become_strings() -> None:
    assert decode(encode(manifest(meta={2: "b", 10: "a"})), PATH).meta == {"2": "b", "10": "a"}


@given(st.data())
def test_every_flipped_bit_is_found(data: st.DataObject) -> None:
    raw = bytearray(encode(manifest(meta={"position": 1234567, "lr": 3e-4})))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(StateError, match=str(PATH)):
        decode(bytes(raw), PATH)


@given(st.data())
def test_every_truncation_is_found(data: st.DataObject) -> None:
    raw = encode(manifest())
    with pytest.raises(StateError, match="truncated"):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))], PATH)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_is_a_state_error(raw: bytes) -> None:
    with pytest.raises(StateError, match=r"manifest\.json"):
        decode(raw, PATH)


def forged(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest with a valid digest that encode would not write."""
    body = json.loads(encode(manifest()))
    del body["digest"]
    change(body)
    tail = json.dumps(body).removeprefix("{").encode()
    return f'{{\n "digest": "{digest_bytes(tail)}",\n'.encode() + tail


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "a\x1b[2J", "", 7])
def test_a_manifest_with_an_unsafe_name_is_refused(name: object) -> None:
    raw = forged(lambda body: body["files"][0].update(name=name))
    with pytest.raises(StateError, match="is not a file name inside a checkpoint"):
        decode(raw, PATH)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": [{"name": "a"}]},
        {"files": [{"name": "a", "size": -1, "digest": RECORD.digest}]},
        {"files": [{"name": "a", "size": 1, "digest": "md5:0"}]},
        {"files": [{"name": "a", "size": 1, "digest": RECORD.digest}] * 2},
        {"meta": []},
        {"step": None},
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StateError, match=str(PATH)):
        decode(forged(lambda body: body.update(change)), PATH)


@given(sizes=st.lists(st.integers(0, 10**6), max_size=30), world_size=st.integers(1, 9))
def test_shares_cover_every_file_once_and_evenly(sizes: list[int], world_size: int) -> None:
    files = tuple(FileRecord(f"f{i}", size, RECORD.digest) for i, size in enumerate(sizes))
    shares = [manifest(files=files).share(rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(record.name for record in files)
    loads = [sum(sizes[int(name[1:])] + 1 for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0) + 1


@given(st.integers(0, 10**10))
def test_step_folder_round_trip(step: int) -> None:
    assert step_of(step_folder(step)) == step


@pytest.mark.parametrize("name", ["step-1", "step-000000001", "step-0000000a", "xstep-00000001", "LATEST"])
def test_other_folders_are_not_steps(name: str) -> None:
    assert step_of(name) is None
