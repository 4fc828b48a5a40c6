"""Try what another user could do to your runs. The table of tries and outcomes:

try                                           outcome                               test
rename a run root in a folder open to all,    refused, even with the setting        test_places
    by way of links or not
the same in a group's or another user's       refused, or accepted by the setting   test_places
rename it in a folder with the sticky bit     the kernel refuses: accepted          test_the_sticky_bit
put another run folder in place of a job's,   the job runs nothing of it            test_a_job_runs_nothing
    or write its shell functions, or replace
    the code to which a sweep's points link
the same with a job of sbatch/train.sh        its frozen code is not run            test_train_sh_runs_nothing
another user's payload, or open to writers    refused unread                        slurm/test_payload.py
a payload with other content                  refused unread, by each rank too      test_a_changed_payload_…
a password in a URL of the environment        in no file of the run or the job      test_a_password_in_a_url…
your reward loops for ever                    0 after reward.timeout_s, counted     tasks/test_own.py
a completion that starts programs             refused by the guard                  tasks/test_hostile.py
a server asked without its key                401                                   serving/test_gate.py
"""

import grp
import os
import pickle
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from r1hpc.base.errors import StateError
from r1hpc.base.run_dir import RunDir
from r1hpc.launch import run_rank
from r1hpc.slurm import fields, payload
from r1hpc.slurm.script import FUNCTIONS, Script, render
from r1hpc.submission.order import Order
from r1hpc.submission.plan_run import plan_new_run
from tests.commands.submitting import fake_sbatch, submit

ROOT = Path(__file__).parents[1]
ME, OTHER = 12345, 12346
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are private."""
    path = Path(tempfile.mkdtemp(prefix="r1hpc-trust-")).resolve()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def _as_user(uid: int, act: Callable[[], object]) -> str:
    """Act as another user, in a child; what the error says, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            act()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return file.read()


def _folder(path: Path, mode: int = 0o755, uid: int = ME, gid: int = ME) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def _link(path: Path, target: Path, uid: int = ME) -> Path:
    path.symlink_to(target)
    os.chown(path, uid, uid, follow_symlinks=False)
    return path


def _own(place: Path) -> Path:
    return _folder(place / "runs", 0o700)


def _in_a_sticky_folder(place: Path) -> Path:
    return _folder(_folder(place / "tmp", 0o1777, uid=0) / "runs", 0o700)


def _open_to_all(place: Path) -> Path:
    return _folder(_folder(place / "pp", 0o777) / "runs", 0o700)


def _link_into_a_folder_open_to_all(place: Path) -> Path:
    return _link(place / "link", _open_to_all(place))


def _link_by_way_of_one(place: Path) -> Path:
    """Only the second of two links lies where all may write."""
    second = _link(_folder(place / "pp", 0o777) / "second", _own(place))
    return _link(place / "first", second)


def _of_a_group(place: Path) -> Path:
    return _folder(_folder(place / "project", 0o2770, uid=0, gid=OTHER) / "runs", 0o700)


def _open_to_a_group(place: Path) -> Path:
    return _folder(place / "runs", 0o2770, gid=OTHER)


def _below_another_user(place: Path) -> Path:
    return _folder(_folder(place / "professor", uid=OTHER) / "runs", 0o700)


def _link_to_another_user(place: Path) -> Path:
    return _link(place / "link", _folder(place / "professor", uid=OTHER))


def _link_of_another_user(place: Path) -> Path:
    target = _own(place)
    return _link(_folder(place / "tmp", 0o1777, uid=0) / "link", target, uid=OTHER)


ALL = r"every user may replace files in .*/pp: choose another --run-root, or run: chmod \+t .*/pp"
GROUP = r"group 12346 may write .*: choose another --run-root, run: chmod g-w .*trust_shared_run_root=true"
USER = r"belongs to 12346, who could replace your runs .*cluster\.trust_shared_run_root=true"


@as_root
@pytest.mark.parametrize(
    ("make", "refused", "refused_with_trust"),
    [
        (_own, None, None),
        (_in_a_sticky_folder, None, None),
        (_open_to_all, ALL, ALL),
        (_link_into_a_folder_open_to_all, ALL, ALL),
        (_link_by_way_of_one, ALL, ALL),
        (_of_a_group, GROUP, None),
        (_open_to_a_group, GROUP, None),
        (_below_another_user, USER, None),
        (_link_to_another_user, USER, None),
        (_link_of_another_user, USER, None),
    ],
)
def test_places(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], Path],
    refused: str | None,
    refused_with_trust: str | None,
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: ME)
    run = make(place) / "run"
    for trust, words in ((False, refused), (True, refused_with_trust)):
        if words is None:
            fields.check_parents(run, trust)
        else:
            with pytest.raises(StateError, match=words):
                fields.check_parents(run, trust)


@as_root
def test_another_user_judges_by_their_own_id(place: Path) -> None:
    run = _folder(place / "runs") / "run"
    assert _as_user(ME, lambda: fields.check_parents(run)) == ""
    said = _as_user(OTHER, lambda: fields.check_parents(run))
    assert said.startswith(f"StateError: {place}/runs belongs to {ME}, who could replace your runs")


@as_root
def test_the_sticky_bit(place: Path) -> None:
    """Without it the attack works; with it the kernel refuses it."""
    for make, attack_works in ((_open_to_all, True), (_in_a_sticky_folder, False)):
        root = make(place)
        failed = _as_user(OTHER, partial(root.rename, root.with_name("gone")))
        assert (failed == "") == attack_works


def test_a_group_in_which_nobody_else_is_may_write(tmp_path: Path) -> None:
    """As on systems that make a group for each user, whose umask is 002."""
    user = pwd.getpwuid(os.getuid())
    group = grp.getgrgid(user.pw_gid)
    if group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
        pytest.skip("this user has no group of their own")
    (tmp_path / "runs").mkdir()
    os.chown(tmp_path / "runs", -1, user.pw_gid)
    (tmp_path / "runs").chmod(0o775)
    fields.check_parents(tmp_path / "runs" / "x")


@as_root
@pytest.mark.parametrize("is_dry_run", [True, False])
def test_submit_refuses_and_the_setting_accepts(place: Path, is_dry_run: bool) -> None:
    (place / "bin").mkdir()
    _folder(place / "runs", 0o2770, uid=0, gid=OTHER)
    fake_sbatch(place)
    words = [
        "jobs/smoke.yaml",
        "--executor",
        "slurm",
        "--run-name",
        "a",
        *(["--dry-run"] if is_dry_run else []),
    ]
    done = submit(place, *words)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: group {OTHER} may write {place}/runs, so its members could replace"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not (place / "runs" / "a").exists()
    done = submit(place, *words, "cluster.trust_shared_run_root=true")
    assert done.returncode == 0, done.stderr
    assert (place / "runs" / "a").exists() != is_dry_run


@as_root
def test_a_resume_looks_again(place: Path) -> None:
    (place / "bin").mkdir()
    fake_sbatch(place)
    words = ["--executor", "slurm"]
    assert submit(place, "jobs/smoke.yaml", *words, "--run-name", "a").returncode == 0
    run = RunDir(place / "runs" / "a")
    run.attempts.write_text(
        '{"event": "submitted", "time": 1, "executor": "slurm", "job_id": "41"}\n'
        '{"event": "begin", "time": 2, "attempt": 1, "job_id": "41", "node_names": ["n"], "ranks": 1}\n'
        '{"event": "end", "time": 3, "attempt": 1, "cause": "crash", "requeued": false}\n'
    )
    (place / "runs").chmod(0o777)
    done = submit(place, "--run-name", "a", "--resume", *words)
    assert (done.returncode, "chmod +t" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("spoilt", [".", "code/r1hpc/slurm/job.bash", "code", "code/.."])
@pytest.mark.parametrize("how", ["owner", "group"])
def test_a_job_runs_nothing(tmp_path: Path, spoilt: str, how: str) -> None:
    """Its folder, or the file that its script sources, became another user's, or others may write it."""
    calls = _programs(tmp_path)
    run = _frozen_run(tmp_path / "run", calls)
    if spoilt in {"code", "code/.."}:  # a sweep's point
        (tmp_path / "shared").mkdir()
        run.code.rename(tmp_path / "shared" / "code")
        run.code.symlink_to("../shared/code")
    python = (str(tmp_path / "bin" / "python"),)
    (tmp_path / "job.sh").write_text(render(Script(run.path, python, 1, {"nodes": "1"})))
    _spoil(run.path / spoilt, how)
    done = _run(tmp_path, "job.sh")
    assert done.returncode == 1
    said = f"the run folder {run.path} is another user's, or others may write it: not run"
    assert said in done.stdout
    assert calls.read_text() == f"scontrol update JobId=9 Comment={said}\n"


@pytest.mark.parametrize("spoilt", [".", "code/r1hpc/slurm/job.bash"])
@pytest.mark.parametrize("how", ["owner", "group"])
def test_train_sh_runs_nothing(tmp_path: Path, spoilt: str, how: str) -> None:
    calls = _programs(tmp_path)
    run = _frozen_run(tmp_path / "runs" / "train-9", calls)
    _spoil(run.path / spoilt, how)
    shutil.copy(ROOT / "sbatch" / "train.sh", tmp_path / "train.sh")
    done = _run(tmp_path, "train.sh", R1HPC_RUN_ROOT="runs", R1HPC_PYTHON=str(tmp_path / "bin" / "python"))
    assert done.returncode == 1
    said = "the run folder runs/train-9 is another user's, or others may write it: not run"
    assert said in done.stdout
    assert calls.read_text() == f"scontrol update JobId=9 Comment={said}\n"


def test_train_sh_does_not_run_the_code_of_a_run_without_shell_functions(tmp_path: Path) -> None:
    """A run of an earlier version, and the functions of the clone."""
    calls = _programs(tmp_path)
    run = _frozen_run(tmp_path / "runs" / "train-9", calls)
    run.shell_functions.unlink()
    (tmp_path / "r1hpc" / "slurm").mkdir(parents=True)
    shutil.copy(FUNCTIONS, tmp_path / "r1hpc" / "slurm")
    _spoil(run.path, "group")
    shutil.copy(ROOT / "sbatch" / "train.sh", tmp_path / "train.sh")
    done = _run(tmp_path, "train.sh", R1HPC_RUN_ROOT="runs", R1HPC_PYTHON=str(tmp_path / "bin" / "python"))
    assert done.returncode == 1
    assert "the run folder runs/train-9 is another user's, or others may write it: not run" in done.stdout
    assert "python" not in calls.read_text()


def _frozen_run(path: Path, calls: Path) -> RunDir:
    """A run on record whose shell functions note that they were sourced."""
    run = RunDir(path)
    run.create()
    run.attempts.write_text("{}\n")
    run.shell_functions.parent.mkdir(parents=True)
    (run.code / "r1hpc" / "submit.py").touch()
    run.shell_functions.write_text(f"echo sourced >> {calls}\n{FUNCTIONS.read_text()}")
    run.shell_functions.chmod(0o600)
    return run


def _spoil(path: Path, how: str) -> None:
    if how == "group":
        path.chmod(0o770)
    elif os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    else:
        os.chown(path, OTHER, OTHER)


def _programs(tmp_path: Path) -> Path:
    """A PATH where programs note that they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "scontrol", "srun", "squeue"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n')
        (tmp_path / "bin" / name).chmod(0o700)
    return tmp_path / "calls"


def _run(tmp_path: Path, script: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environ = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "SLURM_JOB_ID": "9",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_END_TIME": "99999999999",
        **variables,
    }
    command = ["bash", str(tmp_path / script)]
    return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60)


class _Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("bomb", "names posix.mkdir, which no submission writes"),
        ("argument", "names posix.mkdir, which no submission writes"),
        ("cut off", "is damaged"),
        ("text", "is damaged"),
    ],
)
def test_a_changed_payload_is_not_loaded(tmp_path: Path, content: str, said: str) -> None:
    run, canary = RunDir(tmp_path / "run"), tmp_path / "canary"
    run.create()
    payload.folder_of(run.path).mkdir(mode=0o700)
    path = payload.path_of(run.path, "9")
    path.touch(0o600)
    path.write_bytes(
        {
            "bomb": pickle.dumps(_Bomb(canary)),
            "argument": pickle.dumps(DelayedSubmission(run_rank, _Bomb(canary))),
            "cut off": pickle.dumps(DelayedSubmission(run_rank, str(run.path)))[:-9],
            "text": b"no pickle\n",
        }[content]
    )
    with pytest.raises(StateError, match=said):
        payload.check(run.path, "9")
    # As each rank is started.
    command = [sys.executable, "-m", "r1hpc.slurm.payload", str(run.path / "submitit")]
    environ = {**os.environ, "SLURM_JOB_ID": "9", "PYTHONPATH": str(ROOT), "SUBMITIT_EXECUTOR": "slurm"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not canary.exists()


URLS = {
    "WANDB_BASE_URL": "https://me:hunter2x@wandb.example.org",
    "HTTPS_PROXY": "me:hunter2x@proxy:3128",
    "http_proxy": "http://hunter2x@proxy:3128",
    "HF_ENDPOINT": "https://me:hunter2x@mirror.example.org",
    "PIP_INDEX_URL": "https://hunter2x@index.example.org/simple",
    "R1HPC_MIRROR": "https://me:hunter2x@mirror.example.org",
    "VLLM_TARGET": "https://hunter2x@target.example.org",
}


def test_a_password_in_a_url(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    fake_sbatch(tmp_path)
    done = submit(tmp_path, "jobs/smoke.yaml", "--executor", "slurm", "--run-name", "a", **URLS)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    names = "HTTPS_PROXY, R1HPC_MIRROR, VLLM_TARGET, WANDB_BASE_URL, http_proxy"
    assert f"not passed to the job, since the value holds a password or a token: {names}" in said
    assert "hunter2x" not in done.stdout + done.stderr + (tmp_path / "env").read_text()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 100
    assert [path for path in files if b"hunter2x" in path.read_bytes()] == []


def test_a_password_in_the_url_of_a_tracker_that_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / "bin").mkdir()
    words = ("jobs/smoke.yaml", "--executor", "local", "monitor.trackers=[wandb]")
    done = submit(tmp_path, *words, WANDB_BASE_URL=URLS["WANDB_BASE_URL"])
    assert done.returncode == 2
    assert "WANDB_BASE_URL holds a user or a password" in done.stderr
    assert "wandb login --host URL" in done.stderr
    assert "hunter2x" not in done.stderr


def test_a_password_in_a_url_of_the_profile(tmp_path: Path) -> None:
    order = Order(
        job="jobs/smoke.yaml",
        executor="local",
        run_root=tmp_path / "runs",
        overrides=("cluster.environment.WANDB_BASE_URL=https://hunter2x@wandb.example.org",),
    )
    with pytest.raises(
        Exception, match=r"cluster\.environment\.WANDB_BASE_URL would write a secret"
    ) as refused:
        plan_new_run(order)
    assert "hunter2x" not in str(refused.value)
