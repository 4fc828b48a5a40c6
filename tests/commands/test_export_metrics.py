"""Event files as TensorBoard itself reads them, and W&B as far as it goes without a network."""

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1hpc import export_metrics as command
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.config import load
from r1hpc.telemetry.records.metrics import MetricWriter
from r1hpc.telemetry.trackers.writers import wandb_id
from tests.commands.test_samples import add_sample
from tests.recorded import RecordedRun, loss_of
from tests.telemetry.wandb_file import read_offline, run_ids

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> [(step, value)], by TensorBoard's own reader."""
    reader = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.fixture
def made(tmp_path: Path) -> RecordedRun:
    """25 steps, of which the last ten are lost, then 16 to 40."""
    made = RecordedRun(tmp_path / "runs" / "demo", gpus=2)
    made.submit("local-1")
    made.attempt(1, 25, "node_fail", committed=15)
    made.attempt(16, 40, "finished", committed=40)
    return made


def test_the_steps_that_lasted(made: RecordedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(made.run.path), "--to", "tensorboard", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == 40
    found = read_events(Path(answer["folder"]))
    steps, losses = zip(*found["train/loss"], strict=True)
    assert steps == tuple(range(1, 41))
    assert losses == pytest.approx([loss_of(step) for step in steps])
    assert {"train/lr", "train/mfu", "train/step_time_s", "train/tokens_per_second"} <= found.keys()
    assert "train/attempt" not in found


def test_exporting_again_replaces_what_was_there(made: RecordedRun) -> None:
    folder = made.run.report / "tensorboard"
    for _ in range(4):
        command.main([str(made.run.path), "--to", "tensorboard"])
        newest = max(folder.iterdir(), key=lambda path: path.name)
        # As if it were of another second; the last one that was written is of this one.
        newest.rename(newest.with_name(newest.name.replace(newest.name.split(".")[3], "1000000000")))
        assert len(read_events(folder)["train/loss"]) == 40
    command.main([str(made.run.path), "--to", "tensorboard"])
    assert len(list(folder.iterdir())) == 2, "the newest before stays, for a TensorBoard that reads it"
    assert len(read_events(folder)["train/loss"]) == 40


def test_rewards_lie_under_rl(made: RecordedRun, tmp_path: Path) -> None:
    MetricWriter(made.run, 2).step(global_step=41, loss=float("nan"), reward=0.5, kl=None, note="x")
    command.main([str(made.run.path), "--to", "tensorboard", "--out", str(tmp_path / "tb")])
    found = read_events(tmp_path / "tb" / "demo")
    assert found["rl/reward"] == [(41, 0.5)]
    assert len(found["train/loss"]) == 40, "TensorBoard draws no nan"
    assert not {"rl/kl", "rl/note"} & found.keys()


def test_stages_of_two_chains_keep_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    class Settings:
        def __init__(self, **_: object) -> None: ...

    def init(**asked: object) -> SimpleNamespace:
        opened.append((asked["id"], asked["name"]))
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None, resumed=False)

    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(Settings=Settings, init=init, teardown=lambda: None)
    )
    for chain in ("one", "two"):
        (tmp_path / chain).mkdir()
        (tmp_path / chain / "chain.yaml").touch()
        run = str(RecordedRun(tmp_path / chain / "grpo").run.path)
        assert command.main([run, "--to", "wandb"]) == 0
        assert command.main([run, "--to", "tensorboard", "--out", str(tmp_path / "tb")]) == 0
    assert opened == [("one+grpo", "one/grpo"), ("two+grpo", "two/grpo")]
    assert sorted(path.name for path in (tmp_path / "tb").iterdir()) == ["one+grpo", "two+grpo"]


@pytest.mark.parametrize("samples", [True, False])
def test_completions_go_along_unless_they_are_private(made: RecordedRun, samples: bool) -> None:
    config = load.read(made.run.config)
    load.save(replace(config, monitor=replace(config.monitor, samples=samples)), made.run.config)
    add_sample(made.run, 10, 1, "5 *not bold*")
    add_sample(made.run, 20, 1, "of a step that was lost")
    add_sample(made.run, 30, 2, "until the next rollout", is_lasting=False)
    assert command.main([str(made.run.path), "--to", "tensorboard"]) == 0
    reader = accumulator.EventAccumulator(str(made.run.report / "tensorboard"))
    reader.Reload()
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for tag in reader.Tags()["tensors"]
        for event in reader.Tensors(tag)
    }
    assert list(texts) == ([10] if samples else [])
    if samples:
        assert "accuracy=0" in texts[10]
        assert "\n    5 *not bold*" in texts[10], "as code, which Markdown leaves alone"


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_without_the_extra_the_command_says_what_to_install(
    made: RecordedRun, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.summary.writer.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(R1hpcError, match=f"pip install 'r1hpc\\[{package}\\]'"):
        command.main([str(made.run.path), "--to", package])


def test_wandb_offline_leaves_a_folder_to_sync(made: RecordedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What W&B's servers make of it is not tested: that needs a network and an account."""
    pytest.importorskip("wandb")
    add_sample(made.run, 10, 1, "5")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert command.main([str(made.run.path), "--to", "wandb"]) == 0
    steps = read_offline(made.run.report / "wandb")
    assert list(steps) == list(range(1, 41))
    assert [step for step, values in steps.items() if any("samples" in key for key in values)] == [10]
    (table,) = (made.run.report / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[False, 0.25, "accuracy=0", "4", "2+2=", "5"]]
    (first,) = run_ids(made.run.report / "wandb")
    assert first.startswith("demo-")
    other = RecordedRun(made.run.path.parent.parent / "others" / "demo")
    other.clock += 1
    other.submit("local-2")
    assert wandb_id(made.run) == first
    assert wandb_id(other.run) != first, "two runs of one name are two"


def test_the_command_loads_neither_torch_nor_the_extras() -> None:
    heavy = "{'torch', 'tensorboard', 'wandb', 'numpy'}"
    code = f"import sys, r1hpc.export_metrics; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_collectors_folder_gets_a_file_that_another_user_can_read(
    made: RecordedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "textfile"
    argv = [str(made.run.path), "--to", "prometheus", "--out", str(folder), "--json"]
    with pytest.raises(UsageError, match="is no folder"):
        command.main(argv)
    folder.mkdir()
    assert command.main(argv) == 0
    file = Path(json.loads(capsys.readouterr().out)["file"])
    assert file == folder / "r1hpc-demo.prom"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert command.main([str(made.run.path), "--to", "prometheus"]) == 0
    assert stat.S_IMODE((made.run.metrics / "r1hpc.prom").stat().st_mode) == 0o600
