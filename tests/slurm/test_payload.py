"""The pickle submitit loads: tiny, by reference, and refused unread when somebody planted it."""

import os
import pickle
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from r1hpc.base.errors import StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.launch import run_rank
from r1hpc.slurm import payload, submitit_job

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    payload.folder_of(run.path).mkdir(mode=0o700)
    return run


def _plant(run: RunDir) -> Path:
    path = payload.path_of(run.path, "9")
    path.write_bytes(pickle.dumps(DelayedSubmission(run_rank, str(run.path))))
    path.chmod(0o600)
    return path


def test_a_payload_of_ones_own_passes(run: RunDir) -> None:
    _plant(run)
    payload.check(run.path, "9")


def test_a_symbolic_link_is_refused(run: RunDir, tmp_path: Path) -> None:
    path = _plant(run)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="symbolic link"):
        payload.check(run.path, "9")


@pytest.mark.parametrize("what", ["payload", "folder", "run"])
def test_what_others_may_write_is_refused(run: RunDir, what: str) -> None:
    path = _plant(run)
    opened = {"payload": path, "folder": path.parent, "run": run.path}[what]
    opened.chmod(opened.stat().st_mode | 0o020)
    with pytest.raises(StateError, match="chmod go-w"):
        payload.check(run.path, "9")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(run: RunDir) -> None:
    os.chown(_plant(run), 12345, 12345)
    with pytest.raises(StateError, match="belongs to uid 12345"):
        payload.check(run.path, "9")


def test_a_payload_that_never_comes(run: RunDir) -> None:
    with pytest.raises(StateError, match="submission interrupted"):
        payload.check(run.path, "9", patience_s=0.3)


def test_a_job_that_a_job_script_submitted_takes_the_newest(run: RunDir) -> None:
    _plant(run)
    payload.check(run.path, "10", patience_s=0.5)
    assert payload.path_of(run.path, "10").read_bytes() == payload.path_of(run.path, "9").read_bytes()


def test_a_job_whose_submission_was_cut_off_takes_what_it_left(run: RunDir) -> None:
    left = _plant(run).rename(payload.folder_of(run.path) / f"{'0123456789abcdef' * 2}.pkl")
    payload.check(run.path, "10", patience_s=0.5)
    assert payload.path_of(run.path, "10").read_bytes() == left.read_bytes()


def test_a_submission_leaves_a_tiny_private_payload(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\nenv > {tmp_path}/env\necho '41;alpha'\n")
        (tmp_path / "bin" / name).chmod(0o700)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\n")
    (tmp_path / "bin" / "squeue").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name in ("SLURM_JOB_ID", "MASTER_ADDR", "RANK", "HF_TOKEN", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setattr(os, "umask", os.umask)
    os.umask(0o002)
    try:
        job_id = submitit_job.submit(run)
    finally:
        os.umask(0o022)
    assert job_id == "41"
    path = payload.path_of(run.path, "41")
    assert path.stat().st_size < 500
    assert [p.stat().st_mode & 0o077 for p in payload.folder_of(run.path).iterdir()] == [0]
    payload.check(run.path, "41")
    delayed = pickle.loads(path.read_bytes())
    assert (delayed.function, delayed.args) == (run_rank, (str(run.path),))
    assert "foreign" not in (tmp_path / "env").read_text()
