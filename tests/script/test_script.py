"""Stage script: refused before the queue, killed and stopped, resumed to the bit."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from r1hpc.attempt.limits import reason_to_stop
from r1hpc.attempt.workload import Facts
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.complete import record_complete
from r1hpc.checkpoint.store import CheckpointStore
from r1hpc.config.load import load
from r1hpc.config.paths import with_absolute_paths
from r1hpc.config.schema.run import LimitsConfig
from r1hpc.preflight.findings import CheckState
from r1hpc.preflight.run_all import examine
from r1hpc.script.checkpoints import Watcher, newest_checkpoint, note_earlier
from r1hpc.script.look import look_at
from r1hpc.script.rank import command_of
from r1hpc.script.workload import SCRIPT
from r1hpc.slurm.rank_env import choose_port
from r1hpc.telemetry.records.attempts import AGAIN_BY_ITSELF, Attempt, Cause
from r1hpc.telemetry.records.metrics import audit_ledger, compare, read_ledger, read_steps
from tests.preflight.doctors import doctor
from tests.runs import CHECKOUT, command_output, submit, wait_over, wait_step

SCRIPTS = Path(__file__).parent / "scripts"
LOOP = str(SCRIPTS / "own_loop.py")
HOOK = CHECKOUT / "r1hpc/client/hook"
ON_CPU = "resources.gpus_per_node=0"


def script_pids(run: RunDir) -> list[int]:
    """Processes of the script, by what each said when it began."""
    newest = max(run.path.glob("attempts/*/script_0.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text())["pid"] for path in sorted(newest.parent.glob("script_*.json"))]


def refusal(script: Path | str, *overrides: str) -> str:
    config = with_absolute_paths(load(str(script), overrides))
    with pytest.raises(UsageError) as refused:
        SCRIPT.check_settings(config, Facts(RunDir("run")))
    return str(refused.value)


def test_a_script_that_would_fail_in_the_queue_is_refused(tmp_path: Path) -> None:
    bad, own = tmp_path / "bad.py", tmp_path / "own.py"
    bad.write_text("def f(:\n")
    own.write_text("print('hello')\n")
    assert "bad.py, line 1: " in refusal(bad)
    assert "nothing tells how own.py goes on after a preemption" in refusal(own)
    assert "script.args uses {steps}" in refusal(LOOP, "script.args=[--steps, '{steps}']")
    assert "torchrun starts processes of its own" in refusal(LOOP, "script.python=torchrun")
    assert "is no folder" in refusal(LOOP, "script.cwd=/nowhere")
    resume, checkpoints = "script.args=[--resume, '{checkpoint}']", "script.checkpoints='out/*'"
    assert "need the pattern of its checkpoints" in refusal(own, resume)
    assert "need the pattern of its checkpoints" in refusal(
        own, "script.resume_args=[--again]", "script.checkpoints=''"
    )
    assert "nothing fills {wd}. Known are {run}, " in refusal(own, "script.args=['--wd={wd}']", checkpoints)
    wrong = refusal(own, "script.args=['out-{chekpoint}']", checkpoints)
    assert "nothing fills {chekpoint} (did you mean 'checkpoint'?)" in wrong
    with pytest.raises(UsageError, match=r"quote the braces, '\{checkpoint\}'"):
        load(str(own), ["script.args=[--resume,{checkpoint}]"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["script.checkpoints=''"], "it begins anew after each preemption"),
        (["script.checkpoints='c*.pt'"], "it must find its newest checkpoint by itself"),
        (["script.checkpoints='c*.pt'", "script.resume_args=[-r]"], "checkpoint is passed on"),
        (["script.checkpoints='c*.pt'", "script.args=['--name=ckpt-{epoch}.pt']"], "by itself"),
    ],
)
def test_how_a_script_of_its_own_resumes_is_told(tmp_path: Path, overrides: list[str], said: str) -> None:
    (tmp_path / "own.py").write_text("")
    config = with_absolute_paths(load(str(tmp_path / "own.py"), overrides))
    assert said in SCRIPT.check_settings(config, Facts(RunDir("run"))).notes[0]


def test_the_newest_complete_checkpoint_of_its_own_is_passed_on(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    config = load(
        str(script),
        [f"script.cwd={tmp_path}", "script.checkpoints='out/checkpoint-*'", "script.resume_args=[--again]"]
        + ["script.args=[--lr,'1','--from={checkpoint}',--resume,'{checkpoint}']"],
    )
    assert command_of(run, config, newest_checkpoint(run, config))[2:] == [str(script), "--lr", "1"]
    for number in (1, 2):
        folder = tmp_path / f"out/checkpoint-{number}"
        folder.mkdir(parents=True)
        (folder / "model").write_text("weights")
        os.utime(folder, (number, number))
    record_complete(run, tmp_path / "out/checkpoint-1")
    first = str(tmp_path / "out/checkpoint-1")
    again = ["--lr", "1", f"--from={first}", "--resume", first, "--again"]
    assert command_of(run, config, newest_checkpoint(run, config))[3:] == again
    absolute = load(str(script), [f"script.checkpoints='{tmp_path}/out/checkpoint-*'"])
    assert newest_checkpoint(run, absolute) == tmp_path / "out/checkpoint-1"
    (tmp_path / "out/checkpoint-1/model").write_text("changed since")
    assert newest_checkpoint(run, config) is None


def in_a_job(root: Path) -> tuple[Path, dict[str, str]]:
    """A run folder, and the environment of its script."""
    run = root / "run"
    (run / "attempts/1").mkdir(parents=True)
    facts = {"run": str(run), "attempt": 1, "token": "t", "rank": 0, "world_size": 1, "local_rank": 0}
    facts |= {
        "num_nodes": 1,
        "keep": 2,
        "save_every": 0,
        "deadlines": {},
        "checkpoints": str(run.parent / "*.pt"),
    }
    return run, {**os.environ, "R1HPC_CLIENT": json.dumps(facts), "PYTHONPATH": f"{HOOK}:{CHECKOUT}:{root}"}


def test_torch_save_leaves_a_whole_file(tmp_path: Path) -> None:
    code = (
        "import torch, sys, os\n"
        "torch.save({'a': 1}, sys.argv[1])\n"
        "class Bad:\n"
        "    def __reduce__(self): os._exit(7)\n"
        "torch.save({'a': Bad()}, sys.argv[1])\n"
    )
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    run, environment = in_a_job(tmp_path / "link")
    file = tmp_path / "scratch/ckpt.pt"
    done = subprocess.run([sys.executable, "-c", code, str(file)], env=environment)
    assert done.returncode == 7
    loaded = f"import torch; assert torch.load({str(file)!r}) == {{'a': 1}}"
    subprocess.run([sys.executable, "-c", loaded], check=True)
    assert str(file) in (run / "script-checkpoints.jsonl").read_text()


def test_two_ranks_killed_and_stopped_equal_the_undisturbed_run(tmp_path: Path) -> None:
    plain = submit(tmp_path, "plain", ON_CPU, "--nodes", "2", "--", "--steps", "80", job=LOOP).run
    wait_over(plain)
    run = submit(
        tmp_path, "hit", ON_CPU, "--nodes", "2", "--", "--steps", "80", "--pause", "0.05", job=LOOP
    ).run
    wait_step(run, 25)
    os.kill(script_pids(run)[1], signal.SIGKILL)
    wait_step(run, 47)
    run.stop.touch()
    assert [(a.cause, a.detail[:6]) for a in wait_over(run)] == [
        (Cause.crash, "rank 1"),
        (Cause.stopped, "STOP w"),
    ]
    submit(tmp_path, "hit", "--resume")
    attempts = wait_over(run)
    assert [a.cause for a in attempts] == [Cause.crash, Cause.stopped, Cause.finished]
    assert attempts[2].resumed_from in range(47, 80)
    assert compare(plain, run) == []
    assert len(set(re.findall("weights (.*)", all_logs(plain) + all_logs(run)))) == 1
    assert "steps that lasted" in command_output(["-m", "r1hpc.report", str(run.path)])


def all_logs(run: RunDir) -> str:
    return "".join(path.read_text() for path in run.logs.glob("attempt_*/rank_*.out"))


def test_doctor_says_what_a_script_can_be_promised(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import random, torch\nfrom transformers import Trainer, TrainingArguments\n"
        "Trainer(args=TrainingArguments(dataloader_num_workers=2))\n"
    )
    found = [each for each in examine(str(script), tmp_path, None, None).findings if each.check == "script"]
    assert [each.state for each in found] == [CheckState.ok, CheckState.warn]
    assert "stops at a step's end and resumes to the bit" in found[0].detail
    assert "train.py, line 3: random numbers drawn in workers" in found[1].detail
    own = tmp_path / "own.py"
    own.write_text("")
    words = [ON_CPU, "script.checkpoints='c*.pt'", "--", "--from={checkpoint}"]
    detail = doctor(tmp_path / "runs", str(own), *words)["script"]["detail"]
    assert detail == "own.py: its newest complete checkpoint is passed on"


def test_what_a_resume_cannot_repeat_is_noted(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\nfrom transformers import Trainer\n"
        "class Noisy:\n    def __getitem__(self, index):\n        return torch.rand(3)\n"
        "class Fixed:\n    def __getitem__(self, index):\n"
        "        return torch.rand(3, generator=torch.Generator().manual_seed(index))\n"
        "Trainer().hyperparameter_search()\n"
    )
    notes = look_at(script).notes
    assert [note.partition(":")[0] for note in notes] == ["train.py, line 9", "train.py, line 4"]


def test_an_unknown_version_of_a_library_is_told(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("")
    (tmp_path / "transformers/trainer.py").write_text("value = 1")  # no Trainer
    code = "from transformers.trainer import value; print('goes on', value)"
    _, environment = in_a_job(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "goes on 1\n"
    assert "no support for this transformers.trainer" in done.stderr


def test_checkpoints_of_an_earlier_run_are_not_its_own(tmp_path: Path) -> None:
    script, run = tmp_path / "train.py", RunDir(tmp_path / "run")
    script.write_text("")
    run.path.mkdir()
    for number in (1, 9000):
        (tmp_path / f"ckpt-{number}").mkdir()
        (tmp_path / f"ckpt-{number}/model").write_text("weights")
    config = load(str(script), [f"script.cwd={tmp_path}", "script.checkpoints='ckpt-*'"])
    note_earlier(run, config)
    (tmp_path / "ckpt-1/model").write_text("written again by this run")
    (tmp_path / "ckpt-2").mkdir()  # still empty
    Watcher(run, config).look(is_over=True)
    assert newest_checkpoint(run, config) == tmp_path / "ckpt-1"


def test_a_disk_that_fails_is_no_reason_to_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text("")
    config = load(str(tmp_path / "train.py"), [f"script.cwd={tmp_path}", "script.checkpoints='ckpt-*'"])

    def fail(path: Path, pattern: str) -> list[Path]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "glob", fail)
    with pytest.raises(StateError, match=r"ckpt-.*: Stale file handle"):
        newest_checkpoint(RunDir(tmp_path / "run"), config)
    Watcher(RunDir(tmp_path / "run"), config).look()  # while the script runs it looks again later


def test_a_script_that_asks_to_be_run_again_makes_progress_or_ends() -> None:
    again = f"stopped by {AGAIN_BY_ITSELF}"
    end: dict[str, Any] = {
        "nodes": 1,
        "gpus": 0,
        "first_step": None,
        "last_step": None,
        "last_committed_step": None,
    }
    attempts = [Attempt(n, Cause.preempted, n, n + 1, **end, detail=again) for n in range(1, 10)]
    assert "no new checkpoint" in str(reason_to_stop(attempts, LimitsConfig()))


def test_the_hook_keeps_the_sites_own_and_leaves_a_wrapper_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path.append('/of/the/site')\n")
    script = tmp_path / "train.py"
    is_ours = "os.environ.get('R1HPC_CLIENT_PID') == str(os.getpid())"
    script.write_text(f"import os, sys; print('/of/the/site' in sys.path, {is_ours})\n")
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text("import subprocess, sys; subprocess.call(sys.argv[1:])\n")
    hook = CHECKOUT / "r1hpc/client/hook"
    environment = {**os.environ, "R1HPC_CLIENT": "{}", "R1HPC_SCRIPT": str(script)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (hook, tmp_path, CHECKOUT)))
    python = [sys.executable, "-X", "dev"]
    for command in ([*python, str(script)], [sys.executable, str(wrapper), *python, str(script)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout == "True True\n", done.stderr


def test_a_save_that_fails_gives_the_disk_back(tmp_path: Path) -> None:
    run, environment = in_a_job(tmp_path)
    CheckpointStore(RunDir(run).checkpoints).begin(1, "t")
    code = (
        "import errno\n"
        "from r1hpc.client.run import attempt\n"
        "with attempt().saving(5) as folder:\n"
        "    (folder / 'half').write_bytes(b'x' * 1000)\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "what was committed before is intact" in done.stderr
    assert list(run.rglob("half")) == []


def test_short_steps_do_not_wait_for_another_rank_and_all_stop_at_the_same(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, time\n"
        "import torch.distributed as dist\n"
        "from r1hpc.client.run import attempt\n"
        "dist.init_process_group('gloo')\n"
        "run = attempt()\n"
        "run.resume()\n"
        "for step in range(1, 9):\n"
        "    if step in (4, 6) and run.rank == 1:\n"
        "        time.sleep(2)\n"
        "        os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None\n"
        "    run.log(loss=step + run.rank, global_step=99)\n"
        "    run.used(1, 2 * step - 2 + run.rank, 2**70 + run.rank)\n"
        "    began = time.monotonic()\n"
        "    stop = run.end_step(step, 0.01).stop\n"
        "    print(step, stop, 'waited' if time.monotonic() - began > 1 else '')\n"
    )
    run, environment = in_a_job(tmp_path)
    (run / "ledger").mkdir()
    job = json.loads(environment["R1HPC_CLIENT"]) | {"world_size": 2}
    with choose_port() as listener:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, **place, "RANK": str(rank), "R1HPC_CLIENT": json.dumps(job | {"rank": rank})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in processes)
    steps = [(line.split() + [""])[:3] for line in first[1:]]
    assert [step for step, _, waited in steps if waited] == ["5", "7"]  # not 4 and 6
    assert [line.split()[:2] for line in second] == [step[:2] for step in steps]
    assert [step for step, stop, _ in steps if stop == "True"] == ["7", "8"]
    assert [step.loss for step in read_steps(RunDir(run)).effective.values()] == [
        step + 0.5 for step in range(1, 9)
    ]
    ledger = read_ledger(RunDir(run))
    assert ledger[8].data == (14, 2, 14 + 15, 2 * 2**70 + 1)
    assert audit_ledger(RunDir(run)).exactly_once
