"""Run the script as a child of this rank, and return how it ended. workload.py calls it on every rank.

    outcome = run_script(job)

The child has the variables of torch.distributed's env://. It is in a process group of its own, so that the
signals of Slurm and of the launcher reach this rank alone, which hands them on: to the script's process if
that uses `r1hpc.client` (by itself, or through a hook), else to the whole group.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from r1hpc.attempt.state.cause import FAILED, failures_in_logs, read_outcomes
from r1hpc.attempt.workload import LeftAloneError, Outcome, RankJob
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import is_listed, read_object, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.client import hooks
from r1hpc.client.job import Job, report_path, unled_path
from r1hpc.client.run import AGAIN
from r1hpc.client.start import HASH_SEED, start_seed
from r1hpc.config.schema.run import RunConfig
from r1hpc.script.checkpoints import Watcher, newest_checkpoint, pattern_of, written
from r1hpc.script.loop import look_of, note_leader, promise
from r1hpc.slurm.rank_env import Meeting, await_meeting, choose_port, network_interface_to
from r1hpc.telemetry.records.attempts import AGAIN_BY_ITSELF
from r1hpc.telemetry.trackers.writers import wandb_id

FILLED = ("run", "checkpoint", "steps", "save_every", "rank", "local_rank", "world_size")
"""Names that are filled in script.args and script.resume_args, as {run}."""
_POLL_S = 0.2
_LOOK_EVERY_S = 5.0
_FIRST_S = 1.5
"""Time for the rank that failed first to leave its outcome."""
_TO_SAVE_S = 60.0
"""Time for what a stopped script left running, where nobody knows when the job is killed."""
_PR_SET_PDEATHSIG = 1
_NOT_FOR_IT = (
    *("PYTHONSAFEPATH", "R1HPC_CLIENT_PID"),
    # By these, Lightning and others would take themselves for tasks of srun, and requeue the job.
    *("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)


class ScriptError(R1hpcError):
    """The script failed; its own words stand above, in the log of the rank."""


class OutOfMemoryError(ScriptError):
    """It ran out of memory, as it says itself."""


def run_script(job: RankJob) -> Outcome:
    """Run the script until it ends; hand on requests to stop.

    Raise ScriptError if it failed, or was killed.
    """
    run, config, context = job.run, job.config, job.context
    meeting = _meet(job)
    newest = Path(meeting["checkpoint"]) if meeting["checkpoint"] else None
    command = command_of(run, config, newest, (context.rank, context.local_rank, context.world_size))
    found = look_of(config.script)
    environment = _environment(job, meeting, found.library)
    job.watchdog.beat("starting the script")
    if context.rank == 0:
        expected = promise(config.script, found)
        print(f"{Path(str(config.script.path)).name}: {expected}\n$ {shlex.join(command)}", flush=True)
        if newest is None and (unknown := written(run, config)):
            print(f"not resumed: {unknown[-1][0]} is not known to be complete", flush=True)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=config.script.cwd,
            stdin=subprocess.DEVNULL,
            preexec_fn=_begin_child,
            process_group=0,
        )
    except OSError as error:
        raise ScriptError(f"cannot start {command[0]}: {error.strerror}") from None
    watcher = Watcher(run, config) if context.rank == 0 else None
    asked = _wait(job, process, watcher)
    _end_group(job, process.pid, asked)
    if watcher:
        watcher.look(is_over=process.returncode in (0, AGAIN))
    return _judge(job, process.returncode, asked)


def command_of(
    run: RunDir, config: RunConfig, newest: Path | None, place: tuple[int, int, int] = (0, 0, 1)
) -> list[str]:
    """Return the command of the script, with `script.resume_args` if there is a checkpoint. `place`: rank,
    local rank and number of ranks."""
    script = config.script
    assert script.path is not None
    words = [*script.args, *script.resume_args] if newest else _for_a_fresh_start(script.args)
    values = (run.path, newest or "", script.steps or "", config.checkpoint.save_every, *place)
    for name, value in zip(FILLED, values, strict=True):
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    if script.python:
        interpreter = shlex.split(script.python)
    else:  # none for a program of its own
        interpreter = [sys.executable, "-u"] if script.path.endswith(".py") else []
    program = ["-m", script.module] if script.module else [script.path]
    return [*interpreter, *program, *words]


def _for_a_fresh_start(words: Sequence[str]) -> list[str]:
    """Leave out words with {checkpoint}, and a flag whose value is one: `--resume {checkpoint}`."""
    kept: list[str] = []
    for word in words:
        if word == "{checkpoint}" and kept and kept[-1].startswith("-"):
            kept.pop()
        elif "{checkpoint}" not in word:
            kept.append(word)
    return kept


def _environment(job: RankJob, meeting: Meeting, library: str) -> dict[str, str]:
    run, config, context = job.run, job.config, job.context
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
    paths = [str(hooks.FOLDER), *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    if str(run.code) not in paths:
        paths.append(str(run.code))
    client = Job.of(job, pattern_of(run, config), start_seed(run), library)
    interface = config.cluster.network_interface or network_interface_to(context.peer_host)
    return {
        **({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}),
        HASH_SEED: str(client.seed),
        "WANDB_RUN_ID": f"{wandb_id(run)}-rank-{context.rank}" if context.rank else wandb_id(run),
        "WANDB_RESUME": "allow",  # all attempts of a rank are one W&B run
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        **(_distributed(job, meeting) if context.world_size > 1 or config.script.distributed else {}),
        "R1HPC_RUN_DIR": str(run.path),
        "R1HPC_SCRIPT": config.script.module or str(config.script.path),
        **client.to_environ(),
        **config.script.env,
    }


def _distributed(job: RankJob, meeting: Meeting) -> dict[str, str]:
    """Return the variables of torch.distributed's env://. With them, scripts take one rank for a group."""
    context = job.context
    return {
        "RANK": str(context.rank),
        "LOCAL_RANK": str(context.local_rank),
        "WORLD_SIZE": str(context.world_size),
        "LOCAL_WORLD_SIZE": str(context.local_world_size),
        "GROUP_RANK": str(context.node_rank),
        "MASTER_ADDR": meeting["host"],
        "MASTER_PORT": str(meeting["port"]),
    }


def _begin_child() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # If this rank is killed, so is the script.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(job: RankJob, process: "subprocess.Popen[bytes]", watcher: Watcher | None) -> str:
    """Wait for the script; return why it was asked to stop, if it was."""
    run, context = job.run, job.context
    stop_file = run.attempt_dir(context.attempt) / "stop.json"
    asked, told, leader, size, look_at = "", "", "", -1, 0.0
    while process.poll() is None:
        if time.monotonic() >= look_at:
            look_at = time.monotonic() + _LOOK_EVERY_S
            if watcher:
                watcher.look()
                leader = note_leader(run, job.config, context.attempt, leader)
            logs = {run.rank_log(context.attempt, rank) for rank in (0, context.rank)}  # often 0 alone prints
            now = sum(path.stat().st_size for path in (*logs, run.train_metrics) if path.exists())
            if now != size:  # what it prints or records is a sign of life
                size = now
                job.watchdog.beat("running the script")
            told = str(read_object(stop_file).get("reason", "")) if is_listed(stop_file) else ""
        reason = job.requests.reason if job.requests.poll()[0] else told
        if reason and not asked:
            asked = reason
            if context.rank == 0 and not told:  # STOP and limits reach rank 0 alone
                write_json(stop_file, {"reason": reason})
            _hand_on(job, process)
        time.sleep(_POLL_S)
    return asked or (job.requests.reason if job.requests.poll()[0] else "")


def _end_group(job: RankJob, group: int, asked: str) -> None:
    """End what the script left running. If it was asked to stop, a child of a shell may still be saving."""
    has_client = report_path(job.run, job.context.attempt, job.context.rank).exists()
    left_s = job.requests.seconds_left() or _TO_SAVE_S
    until = time.monotonic() + (left_s if asked and not has_client else 0)
    with suppress(ProcessLookupError):
        while time.monotonic() < until:
            os.killpg(group, 0)
            job.watchdog.beat("what the script started still runs")
            time.sleep(_POLL_S)
        os.killpg(group, signal.SIGKILL)


def _hand_on(job: RankJob, process: "subprocess.Popen[bytes]") -> None:
    place = (job.run, job.context.attempt, job.context.rank)
    said = read_object(report_path(*place))
    is_led = said.get("leader") or not unled_path(*place).exists()
    number = signal.Signals[f"SIG{job.config.script.stop_signal}"]
    pid = said.get("pid")
    with suppress(ProcessLookupError):
        if isinstance(pid, int) and is_led and os.getpgid(pid) == process.pid:
            os.kill(pid, signal.SIGTERM)  # its client agrees with the other ranks
            return
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, number)


def _judge(job: RankJob, status: int, asked: str) -> Outcome:
    run, context = job.run, job.context
    said = read_object(report_path(run, context.attempt, context.rank))
    step = said.get("global_step") if isinstance(said.get("global_step"), int) else None
    if status == 0 and (not asked or said.get("kind") == "finished"):
        return Outcome(True, step)
    if asked or status == AGAIN:
        return Outcome(False, step, step, asked or said.get("reason") or AGAIN_BY_ITSELF)
    if said.get("kind") == "refused":
        raise UsageError(str(said.get("reason")))
    if status == -signal.SIGKILL:
        raise ScriptError("the script was killed (SIGKILL): mostly by the kernel, for memory")
    others = set(range(context.world_size)) - {context.rank}
    found = failures_in_logs(run, context.attempt, context.world_size, context.node_names, others)
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    why = f": {found[0].detail}" if found else "; see above in its log"
    if "onnection" in why:  # a script whose peer is gone fails as well: name the rank that failed first
        time.sleep(_FIRST_S)
        failed = [each for each in read_outcomes(run, context.attempt) if each.kind == FAILED]
        if failed:
            raise LeftAloneError(f"rank {failed[0].rank} on {failed[0].node} failed: {failed[0].detail}")
    kind = OutOfMemoryError if found and found[0].cause == "oom" else ScriptError
    raise kind(f"the script ended {how}{why}")


def _meet(job: RankJob) -> Meeting:
    """Return rank 0's choice, which it leaves in a file."""
    place = job.run.attempt_dir(job.context.attempt) / "rendezvous.json"
    if job.context.rank == 0:
        with choose_port() as listener:
            port = int(listener.getsockname()[1])
        newest = str(newest_checkpoint(job.run, job.config) or "")
        write_json(
            place, Meeting(host=job.context.master_host, port=port, checkpoint=newest, token=job.token)
        )
    return await_meeting(place, job.token, job.watchdog.beat)
