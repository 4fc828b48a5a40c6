"""FINISHED holds the digests of a run's results; damage is found before they are read."""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from r1hpc import compare, export, status
from r1hpc.base.errors import StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint import finished
from r1hpc.config.load import merge_layers
from tests.recorded import RecordedRun


def _finish(path: Path, seed: int = 0, step: int = 24) -> RunDir:
    made = RecordedRun(path)
    made.submit("4711", "slurm")
    made.attempt(1, step, "finished", committed=step)
    run, rng = made.run, random.Random(seed)
    run.model.mkdir(exist_ok=True)
    (run.model / "config.json").write_text(json.dumps({"model_type": "gpt2", "seed": seed}))
    (run.model / "tokenizer.json").write_text(json.dumps({"seed": seed}))
    for part in (1, 2):
        (run.model / f"model-{part:05d}-of-00002.safetensors").write_bytes(rng.randbytes(3_000_000))
    finished.write_finished(run, step)
    return run


def _cut(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(1, file.stat().st_size))


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _empty(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def _remove(file: Path, rng: random.Random) -> None:
    file.unlink()


def _of_another(file: Path, rng: random.Random) -> None:
    file.write_bytes((file.parents[2] / "other" / "model" / file.name).read_bytes())


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (_cut, _flip, _empty, _remove, _of_another)


def test_each_damage_of_a_model_is_found_and_nothing_is_exported(tmp_path: Path) -> None:
    run = _finish(tmp_path / "demo")
    _finish(tmp_path / "other", seed=1)
    rng, found = random.Random(35), 0
    names = [*sorted(path.name for path in run.model.iterdir()), "FINISHED"]
    for number in range(60):
        name = names[number % len(names)]
        file = run.finished if name == "FINISHED" else run.model / name
        kind = rng.choice(DAMAGES[:3] if name == "FINISHED" else DAMAGES)
        before = file.read_bytes()
        kind(file, rng)
        with pytest.raises(StateError, match=f"{name}|not as it finished"):
            export.main([str(run.path), "--out", str(tmp_path / "out")])
        assert status.main([str(run.path), "--verify"]) == 1
        assert not (tmp_path / "out").exists()
        file.write_bytes(before)
        found += 1
    assert found == 60
    assert export.main([str(run.path), "--out", str(tmp_path / "out")]) == 0


def test_times_and_places_are_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _finish(tmp_path / "demo")
    for path in run.model.iterdir():
        os.utime(path, (1, 1))
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    assert status.main([str(moved), "--verify"]) == 0
    assert "results: verified" in capsys.readouterr().out


def test_added_files_that_a_reader_loads_are_damage(tmp_path: Path) -> None:
    run = _finish(tmp_path / "demo")
    (run.model / "README.md").write_text("notes")
    assert not finished.check_results(run, by_content=True).problems
    (run.model / "chat_template.jinja").write_text("x")
    assert "was not there" in finished.check_results(run, by_content=True).problems[0]


def test_a_run_of_an_earlier_version_reads_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _finish(tmp_path / "demo")
    run.finished.write_text('{"global_step": 24, "time": 1.0}')
    assert status.main([str(run.path), "--verify"]) == 0
    assert "not verified" in capsys.readouterr().out


def test_a_copy_that_differs_is_found(tmp_path: Path) -> None:
    run = _finish(tmp_path / "demo")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text("{}")
    with pytest.raises(StateError, match=r"the copy of config\.json differs"):
        finished.refuse_copy(run, copy)


def test_a_stage_is_old_once_its_input_has_changed(tmp_path: Path) -> None:
    grpo = _finish(tmp_path / "chain" / "grpo")
    run = _finish(tmp_path / "chain" / "evaluate")
    config = merge_layers([{"stage": "evaluate", "model": {"path": str(grpo.model)}}], [])
    run.inputs.write_text(json.dumps(finished.inputs_now(run, config)))
    finished.write_finished(run, None)
    assert finished.why_old(run) == ""
    (tmp_path / "chain").rename(tmp_path / "renamed")
    run = RunDir(tmp_path / "renamed" / "evaluate")
    assert finished.why_old(run) == ""
    again = RunDir(tmp_path / "renamed" / "grpo")
    (again.model / "config.json").write_text('{"trained": "on"}')
    finished.write_finished(again, 26)
    assert finished.why_old(run) == "old: its input grpo is now step 26, it had step 24"


def _chain(root: Path, seed: int) -> dict[str, RunDir]:
    """A finished model, the traces it was taught with, and its evaluation."""
    chain = {name: _finish(root / name, seed) for name in ("traces", "sft", "evaluate")}
    lines = "".join(json.dumps({"index": n, "seed": seed}) + "\n" for n in range(50))
    chain["traces"].traces.write_text(lines)
    chain["evaluate"].parts.mkdir()
    (chain["evaluate"].parts / "part-0.jsonl").write_text(lines)
    chain["evaluate"].evaluation.write_text(json.dumps({"seed": seed}))
    for name in ("traces", "evaluate"):
        shutil.rmtree(chain[name].model)
        finished.write_finished(chain[name], None)
    return chain


def _read(run: RunDir, out: Path) -> None:
    """Run the next command that reads what the stage has left."""
    if run.run_id == "evaluate":
        compare.main([str(run.path), str(run.path)])
    elif run.run_id == "traces":
        config = merge_layers([{"stage": "sft", "data": {"traces": [str(run.traces)]}}], [])
        finished.check_inputs(config, by_content=True)  # as `begin` does on the batch host
    else:
        config = merge_layers([{"stage": "rl", "model": {"path": str(run.model)}}], [])
        with pytest.raises(StateError):
            finished.check_inputs(config, by_content=True)
        export.main([str(run.path), "--out", str(out)])


@pytest.mark.slow
def test_200_damages_of_a_chain_are_found_by_the_next_reader(tmp_path: Path) -> None:
    chain, other = _chain(tmp_path / "chain", 0), _chain(tmp_path / "other", 1)
    rng, counts = random.Random(200), Counter[str]()
    for number in range(200):
        run = chain[rng.choice([*chain])]
        record = finished.read_finished(run)
        assert record is not None
        name = "FINISHED" if number % 10 == 0 else rng.choice(record["files"])["name"]
        file = run.path / name
        kinds = DAMAGES[:3] if name == "FINISHED" else DAMAGES
        kind, before = rng.choice(kinds), file.read_bytes()
        if kind is _of_another:
            file.write_bytes((other[run.run_id].path / name).read_bytes())
        else:
            kind(file, rng)
        if file.exists() and file.read_bytes() == before:
            continue  # a file that both chains have alike
        with pytest.raises(StateError, match=r"is not as it finished|FINISHED"):
            _read(run, tmp_path / "out")
        assert status.main([str(run.path), "--verify"]) == 1
        assert not (tmp_path / "out").exists()
        file.write_bytes(before)
        counts[f"{run.run_id}: {kind.__name__.strip('_')}"] += 1
    print(f"{sum(counts.values())} damages found, none exported: {dict(sorted(counts.items()))}")
    assert sum(counts.values()) == 200
