"""Every record file of a run, spoilt in every way, met by every command: words, never a traceback.

The quick part spoils each file twice; all of it, with each value of each record replaced by another kind:

    python -m pytest tests/test_spoilt_records.py -m soak
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.begin import AttemptFacts
from r1hpc.attempt.state.cause import RankOutcome, write_outcome
from r1hpc.attempt.state.slurm_records import learn
from r1hpc.base.errors import R1hpcError
from r1hpc.base.files import append_record, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import load
from r1hpc.plan.run import make_plan
from r1hpc.slurm.sacct import JobRecord
from r1hpc.telemetry.diagnosis.summary import summarise_run
from r1hpc.telemetry.gpu import history
from r1hpc.telemetry.records.attempts import read_history
from r1hpc.telemetry.records.evaluations import answers_path
from r1hpc.telemetry.records.ranks import RankTimeWriter
from tests.recorded import EPOCH, RecordedRun

BAD, GOOD = "bad", "good"


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": value}


def evaluation(step: int) -> dict[str, Any]:
    each = {
        "num_items": 2,
        "num_questions": 2,
        "num_samples": 2,
        "greedy": interval(0.5),
        "pass_at": {"1": interval(0.5), "2": interval(0.6)},
        "maj_at": {"1": interval(0.5), "2": interval(0.6)},
        "response_length": 12.5,
        "truncated_share": 0.0,
    }
    tasks = {"tasks": {"a": each, "b": each}, "contamination": None}
    return {"global_step": step, "attempt": 1, "time": EPOCH + step, **each, **tasks}


def answer(index: int, right: bool) -> dict[str, Any]:
    counts = {
        "greedy_length": 9,
        "num_samples": 2,
        "num_correct": int(right),
        "mean_length": 9.0,
        "truncated": 0,
    }
    return {
        **{"index": index, "prompt": f"1+{index}=", "expected": "2", "greedy": "2", "sample": "2"},
        **{"greedy_correct": right, "well_formed": True, **counts},
    }


def make_run(root: Path, name: str) -> RunDir:
    """A finished run of two attempts that has left every kind of record."""
    made = RecordedRun(root / name, gpus=4, nodes=1)
    run = made.run
    plan = make_plan(
        load("smoke", ["resources.gpus_per_node=4"]), gpus_per_node=4, vocab_size=512, time_limit_s=3600
    )
    write_json(run.plan, plan.to_json())
    hours = {"p10": 0.01, "p50": 0.02, "p90": 0.04}
    known = {"gpu": "a100", "gpu_given": True, "num_gpus": 4, "params": 1e6}
    write_json(run.estimate, {"gpu_hours": hours, "wall_hours": {"4": hours}, "assumptions": known})
    write_json(run.environment, {"versions": {"torch": "2.9"}, "environ": {}})
    made.submit("4711", "slurm")
    made.attempt(1, 10, "node_fail", committed=5, save_every=5)
    made.attempt(6, 20, "finished", committed=20, save_every=5)
    made.checkpoint(20)
    made.gpu_ticks(made.clock - 20, 10)
    RankTimeWriter(run, 2, ["n1", "n1"], ["GPU-n1-0", None]).write(
        global_step=20, num_steps=5, step_time_s=[1.0, 1.0], wait_s=[0.1, 0.2]
    )
    for step in (0, 20):
        for _ in range(2):  # after a crash the same step may be evaluated again
            append_record(run.rl_evaluations, evaluation(step))
        for index in (0, 1):
            append_record(answers_path(run, step), answer(index, step > 0))
    facts = AttemptFacts(2, "0" * 16, "", 4)
    run.attempt_dir(2).mkdir(parents=True)
    write_json(run.attempt_dir(2) / "attempt.json", vars(facts))
    write_outcome(run, 2, RankOutcome(0, "finished", "n1", 20))
    record = JobRecord("4711", "COMPLETED", EPOCH, EPOCH + 60, 60, 4, 1, "n1", "0:0", 0, *("x",) * 5)
    learn(run, [record], EPOCH + 99, EPOCH + 99)
    summarise_run(run, read_history(run), EPOCH + 99, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "_WORTH_BYTES", 1)
        history.read_gpus(run)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with a good run and one that will be spoilt."""
    root = tmp_path_factory.mktemp("made") / "runs"
    for name in (BAD, GOOD):
        make_run(root, name)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where there is no Slurm."""
    shutil.copytree(made, tmp_path / "runs")
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


RECORDS = (
    "config.yaml",
    "attempts.jsonl",
    "plan.json",
    "estimate.json",
    "environment.json",
    "summary.json",
    "allocations.json",
    "metrics/train.jsonl",
    "metrics/events.jsonl",
    "metrics/ranks.jsonl",
    "metrics/gpu-n1.jsonl",
    "metrics/gpu-n1.folded",
    "metrics/evaluation.jsonl",
    "metrics/answers-000000.jsonl",
    "metrics/answers-000020.jsonl",
    "ledger/attempt_2.jsonl",
    "attempts/2/attempt.json",
    "attempts/2/rank_0.json",
    "checkpoints/step-00000020/manifest.json",
    "FINISHED",
    "needs.json",
    "dataset.json",
    "submission.lock",
    "../calibration.json",
)
JSON_RECORDS = [name for name in RECORDS if name.endswith((".json", ".jsonl", "FINISHED"))]

COMMANDS = (
    *("status bad", "status bad --json", "status --all", "status --all --json"),
    *("logs bad", "diagnose bad", "diagnose bad --json", "samples bad"),
    *("report bad", "report bad --json", "report good bad --format csv", "report --compare bad good"),
    *("budget", "budget --json", "calibrate", "calibrate --json", "compare bad@0 bad@20", "compare bad good"),
    *("export-metrics bad --to prometheus", "cancel bad --save-first", "settings bad/config.yaml"),
    *("shard trace bad --run bad --step 1", "submit --run-name bad --resume --dry-run"),
    *("estimate --params 1e9 --tokens 1e9 --gpu a100", "submit smoke --dry-run"),
    *("launch end bad --attempt 2 --hurry",),
)
HEAVY = (
    *("report bad --plots", "report --format html --out page.html"),
    *("export bad --out OUT", "export-metrics bad --to tensorboard", "chat bad --ask x"),
)
"""Seconds each: matplotlib, torch, tensorboard."""


def deep(_: bytes) -> bytes:
    return b'{"time": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


def huge(raw: bytes) -> bytes:
    """Each number one of 5,000 digits, which Python refuses to print."""
    return b'{"global_step": %s, "attempt": 1, "time": %s}\n' % (b"9" * 5000, b"9" * 5000) + raw


def nan(raw: bytes) -> bytes:
    return b'{"event": "end", "attempt": 1, "time": NaN, "gpus": [{"uuid": "a", "power_w": NaN}]}\n' + raw


SPOILINGS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "not JSON": lambda raw: b"nothing of ours\n" + raw,
    "not UTF-8": lambda raw: b"\xff\xfe\xfa" + raw,
    "zeros": lambda raw: bytes(len(raw)),
    "null": lambda raw: b"null\n",
    "a list": lambda raw: b"[1, [2]]\n" + raw,
    "an object": lambda raw: b"{}\n" + raw,
    "an object alone": lambda raw: b"{}\n",
    "deep": deep,
    "huge": huge,
    "nan": nan,
    "a surrogate": lambda raw: raw.replace(b'"n1"', b'"\\ud800"').replace(b'"2"', b'"\\udfff"'),
}


def no_file(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    else:
        assert kind == "missing"


NO_FILES = ("a folder", "a FIFO", "a link to itself", "missing")


def spoil(root: Path, name: str, kind: str) -> None:
    path = root / BAD / name
    if kind in NO_FILES:
        no_file(kind, path)
    else:
        path.write_bytes(SPOILINGS[kind](path.read_bytes() if path.is_file() else b"{}\n"))


def obey(line: str, root: Path, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command; what it says of the bad run is words."""
    name, *words = line.split()
    argv = [word.replace("OUT", str(root.parent / "out")) for word in words]
    argv = [str(root / word) if word in (BAD, GOOD, "bad/config.yaml") else word for word in argv]
    said = ""
    try:
        import_module(f"r1hpc.{name.replace('-', '_')}").main(argv)
    except R1hpcError as error:
        said = str(error)
        assert said, (line, why)
    except (SystemExit, OSError):
        pass
    except Exception as error:
        raise AssertionError(f"{line}: {why}: {type(error).__name__}: {error}") from error
    printed = capsys.readouterr()
    # What no reader has looked for is caught last of all, under the name of Python's error.
    assert "Error:" not in said + printed.out + printed.err, (line, why, said, printed)


def test_the_runs_are_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        "status bad",
        "report bad",
        "diagnose bad",
        "compare bad@0 bad@20",
        "report --compare bad good",
    ):
        name, *words = line.split()
        assert import_module(f"r1hpc.{name}").main(words) == 0, line
    assert "Held out" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECORDS)
def test_a_spoilt_file_is_met_with_words(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two ways for each file, and some of the commands; the long part below has all."""
    dice = random.Random(name)
    whole = root.parent / "whole"
    shutil.copytree(root, whole)
    for kinds in (tuple(SPOILINGS), NO_FILES):
        kind = dice.choice(kinds)
        spoil(root, name, kind)
        for line in dice.sample(COMMANDS, 8):
            obey(line, root, f"{name} {kind}", capsys)
        shutil.rmtree(root)
        shutil.copytree(whole, root)


def test_the_others_are_reported_and_the_bad_one_left_out_in_words(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root, "attempts.jsonl", "zeros")
    for line in ("status --all", "budget", "report --format html --out page.html"):
        name, *words = line.split()
        assert import_module(f"r1hpc.{name}").main(words) == 0, line
        printed = capsys.readouterr()
        page = Path("page.html").read_text() if "html" in line else ""
        said = printed.out + printed.err + page
        assert "bad is left out" in said, line
        assert "attempts.jsonl" in said, line
    assert "good" in page


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [*SPOILINGS, *NO_FILES])
def test_every_file_in_every_way(kind: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = root.parent / "whole"
    shutil.copytree(root, whole)
    for name in RECORDS:
        spoil(root, name, kind)
        for line in (*COMMANDS, *HEAVY):
            obey(line, root, f"{name} {kind}", capsys)
        shutil.rmtree(root)
        shutil.copytree(whole, root)


OTHERS: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 1e300, -(10**400), 10**18, float("nan"), float("inf"), 1e-300),
    *("", "noon", "1", "\ud800", "\x1b[31m", "x" * 5000),
    *([], [[]], [None], {}, {"a": {}}),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from places(each, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], other: Any) -> Any:
    if not at:
        return other
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[at[0]] = replaced(value[at[0]], at[1:], other)
    return changed


def without(value: Any, at: tuple[Any, ...]) -> Any:
    changed = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1:
        del changed[at[0]]
    else:
        changed[at[0]] = without(value[at[0]], at[1:])
    return changed


def mutations(raw: bytes, dice: random.Random) -> Iterator[tuple[str, bytes]]:
    """One value of one record replaced by another kind of value, or taken away, for each place once."""
    is_one = raw.startswith(b"{\n")
    records = [json.loads(raw)] if is_one else [json.loads(line) for line in raw.splitlines()]
    seen = set()
    for number, record in enumerate(records):
        for at in places(record):
            kind = (record.get("event"), tuple(0 if isinstance(key, int) else key for key in at))
            if kind in seen:
                continue
            seen.add(kind)
            for other in dice.sample(OTHERS, 3):
                changed = [*records[:number], replaced(record, at, other), *records[number + 1 :]]
                yield f"{at} = {str(other)[:20]}", b"".join(json.dumps(r).encode() + b"\n" for r in changed)
            if at:
                changed = [*records[:number], without(record, at), *records[number + 1 :]]
                yield f"{at} away", b"".join(json.dumps(each).encode() + b"\n" for each in changed)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", JSON_RECORDS)
def test_every_value_of_another_kind(name: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / BAD / name
    if not path.is_file():
        pytest.skip("no run of this kind leaves it")
    whole, dice = path.read_bytes(), random.Random(name)
    summary = (root / BAD / "summary.json").read_bytes()
    for why, raw in mutations(whole, dice):
        path.write_bytes(raw)
        for line in dice.sample(COMMANDS, 9):
            obey(line, root, f"{name} {why}", capsys)
        if dice.random() < 0.05:
            obey(dice.choice(HEAVY), root, f"{name} {why}", capsys)
        (root / BAD / "summary.json").write_bytes(summary)
