"""2,000 odd inputs to what reads results, weights, questions, names and sweeps, beyond those of test_fuzz.py.

python -m pytest tests/test_fuzz_results.py -m soak -s
"""

import json
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from r1hpc.base.errors import R1hpcError
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint import finished
from r1hpc.config.schema.rl import TaskConfig
from r1hpc.plan.model.weights import check_headers
from r1hpc.submission.order import Order
from r1hpc.tasks.problems.registry import make_task

pytestmark = pytest.mark.soak
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1e308, "", "x" * 3000, "\ud800", "\0", "../../etc", "\x1b[31m"),
    *([], {}, [[]], {"a": {}}, "xxh3_128:" + "0" * 32, "\u202e", 0.1, "NaN"),
)
_EACH = 500


def _mutated(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: replaced, left out, or under another name."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return rng.choice(_ODD)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], _mutated(value[place], rng), *value[place + 1 :]]
    key = rng.choice([*value])
    rest = {name: each for name, each in value.items() if name != key}
    how = rng.random()
    if how < 0.2:
        return rest
    return {**rest, f"{key}_": value[key]} if how < 0.4 else {**rest, key: _mutated(value[key], rng)}


def test_finished_is_refused_or_the_same(tmp_path: Path) -> None:
    rng, run, counts = random.Random(1), RunDir(tmp_path / "run"), Counter[str]()
    run.model.mkdir(parents=True)
    (run.model / "config.json").write_text("{}")
    finished.write_finished(run, 24)
    original = json.loads(run.finished.read_text())
    for _ in range(_EACH):
        changed = _mutated(original, rng)
        run.finished.write_text(json.dumps(changed))
        try:
            checked = finished.refuse_damaged(run)
            counts["accepted"] += 1
            is_old = isinstance(changed, dict) and not {"digest", "files"} & changed.keys()
            assert changed == original or (is_old and not checked.is_on_record), changed
        except R1hpcError:
            counts["refused"] += 1
        finished.why_old(run)
    print(dict(counts))
    assert sum(counts.values()) == _EACH


def test_headers_are_refused_or_the_same(tmp_path: Path) -> None:
    rng, counts = random.Random(2), Counter[str]()
    config = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 2,
        "vocab_size": 16,
        "n_positions": 8,
    }
    names = [f"h.0.{name}.{kind}" for name in _PARTS for kind in ("weight", "bias")]
    header: dict[str, Any] = {name: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for name in names}
    header["wte.weight"] = {"dtype": "F32", "shape": [16, 8], "data_offsets": [0, 512]}
    for _ in range(_EACH):
        changed = _mutated(header, rng)
        raw = json.dumps(changed).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(512))
        try:
            check_headers(tmp_path, config)
            counts["accepted"] += 1
            assert isinstance(changed, dict), changed
            assert changed.keys() >= header.keys(), changed
            assert changed["wte.weight"]["shape"] == [16, 8], changed
        except R1hpcError:
            counts["refused"] += 1
    print(dict(counts))
    assert sum(counts.values()) == _EACH


_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def test_questions_are_refused_or_read_as_written(tmp_path: Path) -> None:
    rng, counts, path = random.Random(3), Counter[str](), tmp_path / "questions.jsonl"
    said: list[int] = []
    for number in range(_EACH):
        row = _mutated({"question": "What is 1 + 1?", "answer": "2"}, rng)
        raw = json.dumps(row).encode(rng.choice(("utf-8", "utf-8", "utf-16", "utf-32")))
        raw = raw[: rng.randrange(1, len(raw) + 1)] if number % 3 == 0 else raw
        path.write_bytes(raw + b"\n")
        try:
            make_task(TaskConfig("file", options={"path": str(path)})).num_questions(held_out=True)
            counts["accepted"] += 1
            assert isinstance(json.loads(raw.decode("utf-8")), dict), raw
        except R1hpcError as refusal:
            counts["refused"] += 1
            said.append(len(str(refusal)))
    print(dict(counts))
    assert sum(counts.values()) == _EACH
    assert max(said) < 1000


def test_names_are_refused_or_safe(tmp_path: Path) -> None:
    rng, counts = random.Random(4), Counter[str]()
    said: list[int] = []
    letters = "ab.-_/\\ \0\n\x1b$`;:é\ud800\u202e09"
    for _ in range(_EACH):
        name = "".join(rng.choice(letters) for _ in range(rng.choice((1, 2, 5, 70, 4000))))
        name += rng.choice(("", "", ".html", ".yaml", ".json"))
        try:
            run = Order(run_root=tmp_path, run_name=name).new_run()
            counts["accepted"] += 1
            assert run.path.parent == tmp_path
            assert not name.endswith((".html", ".yaml", ".json"))
        except R1hpcError as refusal:
            counts["refused"] += 1
            said.append(len(str(refusal)))
    print(dict(counts))
    assert sum(counts.values()) == _EACH
    assert max(said) < 1000
