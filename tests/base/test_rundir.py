"""The run folder: its paths, and that nobody else can look or write into it."""

import stat
from pathlib import Path

import pytest

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.run_dir import RunDir, default_run_root, open_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "first")
    run.create()
    run.config.touch()
    return run


def test_everything_is_private(run: RunDir) -> None:
    folders = [run.path, *(path for path in run.path.rglob("*") if path.is_dir())]
    assert len(folders) == 6
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


def test_a_run_is_created_once(run: RunDir) -> None:
    with pytest.raises(FileExistsError):
        run.create()


def test_asking_for_a_path_creates_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "x")
    paths = [run.rank_log(3, 2), run.rank_outcome(3, 2), run.gpu_metrics("node-1"), run.train_metrics]
    assert [str(path.relative_to(run.path)) for path in paths] == [
        "logs/attempt_3/rank_2.out",
        "attempts/3/rank_2.json",
        "metrics/gpu-node-1.jsonl",
        "metrics/train.jsonl",
    ]
    assert not run.path.exists()


def test_every_path_lies_in_the_folder(run: RunDir) -> None:
    paths = [path for name in vars(RunDir) if isinstance(path := getattr(run, name), Path)]
    assert len(paths) > 10
    assert all(path.is_relative_to(run.path) for path in paths)
    assert run.run_id == "first"


def test_a_node_name_cannot_leave_the_folder(run: RunDir) -> None:
    with pytest.raises(UsageError):
        run.gpu_metrics("../../x")


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDir("x")
    monkeypatch.chdir("/")
    assert run.path == tmp_path / "x"


def test_open_by_path_and_by_name(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_run(run.path).path == run.path
    monkeypatch.setenv("R1HPC_RUN_ROOT", str(run.path.parent))
    assert default_run_root() == run.path.parent
    assert open_run("first").path == run.path


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run at .*looked for config\.yaml"):
        open_run(tmp_path)


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_folder_others_may_write_is_refused(run: RunDir, mode: int) -> None:
    run.path.chmod(mode)
    with pytest.raises(StateError, match="chmod go-w"):
        open_run(run.path)
