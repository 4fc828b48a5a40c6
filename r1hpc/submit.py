"""Start a run: on Slurm, or on this machine where there is none.

    python -m r1hpc.submit --nodes 4                   # jobs/train.yaml
    python -m r1hpc.submit jobs/smoke.yaml train.num_steps=20 --follow
    python -m r1hpc.submit --nodes 4 --dry-run         # the plan and the script, no Slurm needed
    python -m r1hpc.submit --run-name NAME --resume    # go on with a run, perhaps on other nodes

Everything is checked, then frozen into the run folder, then submitted: exit status 0 means
submitted (with --follow: finished).
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import ArgumentParser, run_door
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.names import check_name, nearest, printable
from r1hpc.slurm import flags

# What is needed only once something is asked for is imported where it is used: --help must be quick.
if TYPE_CHECKING:
    from r1hpc.attempt.announce import Prepared
    from r1hpc.base.rundir import RunDir
    from r1hpc.config.schema import RunConfig

_ASSUMED_GPUS_PER_NODE = 8
_DEFAULT_JOB = "train"
_MAY_CHANGE_ON_RESUME = ("resources.", "cluster.", "limits.", "monitor.", "checkpoint.")
_MAY_CHANGE_TOO = ("train.num_steps", "train.print_every", "train.hang_timeout_s", "deepspeed.zero_stage")


@dataclass(frozen=True)
class _Request:
    """A command line, read."""

    arguments: argparse.Namespace
    argv: tuple[str, ...]
    job: str | None
    overrides: tuple[str, ...]
    """In order: SBATCH_* variables, KEY=VALUE, flags."""


def main(argv: Sequence[str]) -> int:
    """Parse, check, freeze, submit, and follow when asked to."""
    request = _read(argv)
    arguments = request.arguments
    os.umask(0o077)
    if arguments.prepare_only:
        return _prepare_inside_job(request)
    prepared = _resume(request) if arguments.resume else _fresh(request)
    from r1hpc.attempt.announce import announce

    if arguments.dry_run:
        announce(prepared, None, arguments.json, dry_run=True)
        return 0
    job_id = _submit(prepared, request)
    announce(prepared, job_id, arguments.json)
    if arguments.follow:
        from r1hpc.attempt.follow import follow

        return follow(prepared.run, job_id, sys.stderr if arguments.json else sys.stdout)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.submit", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="JOB.yaml | KEY=VALUE", help="job file, dotted overrides")
    parser.add_argument("--executor", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the script; write nothing")
    parser.add_argument("--follow", action="store_true", help="print progress until the run is over")
    parser.add_argument("--run-root", metavar="DIR", help="where runs lie; default $R1HPC_RUN_ROOT or ./runs")
    parser.add_argument("--run-name", metavar="NAME", help="default JOB-DATE-TIME-XXXX")
    parser.add_argument("--resume", action="store_true", help="go on with the run called --run-name")
    parser.add_argument(
        "--cluster", metavar="NAME", help="profile in configs/cluster/; default $R1HPC_CLUSTER"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--prepare-only", action="store_true", help=argparse.SUPPRESS)  # sbatch/train.sh
    flags.add_flags(parser)
    return parser


def _read(argv: Sequence[str]) -> _Request:
    from r1hpc.slurm.fields import refuse_shell_overrides

    parser = _parser()
    # Intermixed: job files, overrides and flags come in any order, as people type them.
    arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        parser.error(f"unknown argument {printable(unknown[0])!r}{nearest(unknown[0].split('=')[0], known)}")
    jobs = [word for word in arguments.words if "=" not in word]
    if len(jobs) > 1:
        raise UsageError(f"two job files, {printable(jobs[0])} and {printable(jobs[1])}: a run has one")
    given = [word for word in arguments.words if "=" in word]
    refuse_shell_overrides(given)
    overrides = [
        *flags.overrides_from_environment(os.environ),
        *given,
        *flags.overrides_from_flags(arguments),
    ]
    return _Request(arguments, tuple(argv), jobs[0] if jobs else None, tuple(overrides))


def _fresh(request: _Request) -> "Prepared":
    """A run that does not exist yet."""
    from r1hpc.config import load

    arguments = request.arguments
    job = request.job or _DEFAULT_JOB
    config = load.load(job, request.overrides, arguments.cluster)
    run = _place(arguments, arguments.run_name or _new_name(job))
    if os.path.lexists(run.path):
        raise UsageError(
            f"there is a run called {run.run_id} in {run.path.parent}: go on with it by --resume, "
            "or choose another --run-name"
        )
    return _decide(run, config, request)


def _resume(request: _Request) -> "Prepared":
    """A run that exists: its frozen code and configuration, with other resources or more steps."""
    from r1hpc.attempt.state import State, look
    from r1hpc.base.rundir import open_run
    from r1hpc.config import load

    arguments = request.arguments
    if not arguments.run_name:
        raise UsageError("--resume goes with --run-name NAME: which run?")
    if request.job:
        raise UsageError(f"--resume takes the job file frozen in the run: leave {printable(request.job)} out")
    run = open_run(_place(arguments, arguments.run_name).path)
    now = look(run)
    if now.state in (State.queued, State.running, State.requeued):
        job = now.job.job_id if now.job else "?"
        raise UsageError(f"{run.run_id} is {now.state} as job {job}: cancel it first, or touch {run.stop}")
    frozen = load.read(run.config)
    # The warning is chosen anew for the time limit and the cluster of this submission.
    overrides = ["resources.signal_lead_s=null", *request.overrides]
    config = load.load(run.config, overrides, arguments.cluster)
    _refuse_another_run(frozen, config)
    if run.finished.exists() and config.train.num_steps <= frozen.train.num_steps:
        raise UsageError(
            f"{run.run_id} is finished; to train on, give train.num_steps={frozen.train.num_steps * 2}"
        )
    return _decide(run, config, request)


def _place(arguments: argparse.Namespace, name: str) -> "RunDir":
    from r1hpc.base.rundir import RunDir, default_run_root
    from r1hpc.slurm.fields import check_path

    root = Path(arguments.run_root) if arguments.run_root else default_run_root()
    check_path(root.absolute(), "--run-root")
    return RunDir(root / check_name(name, "--run-name"))


def _new_name(job: str) -> str:
    import secrets

    return f"{Path(job).stem[:38]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _refuse_another_run(frozen: "RunConfig", config: "RunConfig") -> None:
    """A resumed run must see the same data in the same batches; anything else is another run."""
    before, after = _flat(dataclasses.asdict(frozen)), _flat(dataclasses.asdict(config))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    wrong = [k for k in changed if not k.startswith(_MAY_CHANGE_ON_RESUME) and k not in _MAY_CHANGE_TOO]
    if wrong:
        raise UsageError(
            f"--resume cannot change {', '.join(wrong)}: that would be another run. It may change resources, "
            "limits, checkpoint.*, monitor.* and train.num_steps; for the rest take a new --run-name"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _decide(run: "RunDir", config: "RunConfig", request: _Request) -> "Prepared":
    """Choose the executor, ask the cluster, plan, and check every field; write nothing."""
    from r1hpc.attempt.announce import Prepared
    from r1hpc.config.freeze import refuse_secrets, with_absolute_paths
    from r1hpc.data.preview import preview_vocab_size
    from r1hpc.slurm import decide, fields, script

    arguments = request.arguments
    fields.check_resources(config.resources)
    fields.check_cluster(config.cluster)
    refuse_secrets(config, request.overrides)
    executor, notes = decide.choose_executor(
        arguments.executor, will_submit=not (arguments.dry_run or arguments.prepare_only)
    )
    config = with_absolute_paths(config)
    decision = decide.decide(
        config,
        executor,
        vocab_size=preview_vocab_size(config.data.path, config.data.recipe),
        assumed_gpus_per_node=_ASSUMED_GPUS_PER_NODE if arguments.dry_run else None,
    )
    text = script.make_script(
        run, decision.config, gpus_per_node=decision.gpus_per_node, signal_lead_s=decision.signal_lead_s
    )
    ignored = ", ".join(flags.ignored_variables(os.environ))
    notes += [f"not used from the environment: {ignored}"] if ignored else []
    return Prepared(run, executor, decision, text, (*notes, *decision.notes))


def _submit(prepared: "Prepared", request: _Request) -> str:
    """Write the run folder and start the run; its job id. A new folder does not survive a refusal."""
    from r1hpc.slurm.client import SlurmError

    run, is_new = prepared.run, not request.arguments.resume
    if is_new:
        _create(run)
    try:
        _freeze(prepared, request)
        return _start(prepared, request)
    except (R1hpcError, OSError) as error:
        # An sbatch that did not answer may have submitted all the same: then the job needs its folder.
        if isinstance(error, SlurmError) and error.timed_out:
            raise R1hpcError(
                f"{error}\n{run.path} is kept: look with squeue whether the job is there"
            ) from None
        if is_new:
            shutil.rmtree(run.path)
        raise


def _create(run: "RunDir") -> None:
    from r1hpc.slurm.fields import check_parents

    try:
        run.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(run.path.parent, error) from None
    check_parents(run.path)
    try:
        run.create()
    except FileExistsError:
        raise UsageError(f"another submission has just taken the name {run.run_id}: choose another") from None
    except OSError as error:
        raise _no_folder(run.path, error) from None


def _no_folder(path: Path, error: OSError) -> R1hpcError:
    return R1hpcError(f"cannot make the folder {path} ({error.strerror}): choose another --run-root")


def _freeze(prepared: "Prepared", request: _Request) -> None:
    """Everything the job will read. Of a resumed run the code stays; configuration and plan are renewed."""
    from r1hpc.base.files import write_atomic, write_json
    from r1hpc.config import freeze, load
    from r1hpc.slurm.script import render

    run, decision = prepared.run, prepared.decision
    if request.arguments.resume:
        load.save(decision.config, run.config)
    else:
        freeze.freeze(run, decision.config, request.argv, request.overrides)
    write_json(run.plan, decision.plan.to_json())
    write_atomic(run.script, render(prepared.script))


def _start(prepared: "Prepared", request: _Request) -> str:
    from r1hpc.config.redact import redact
    from r1hpc.telemetry.attempts import record

    run, executor = prepared.run, prepared.executor
    asked_at = time.time()
    _remove_switches(run)
    job_id = _start_here(run) if executor == "local" else _start_on_slurm(prepared)
    # Dated before the start: the attempt that follows belongs to this submission.
    record(
        run,
        "submitted",
        time=asked_at,
        executor=executor,
        job_id=job_id,
        script=str(run.script),
        time_limit_s=prepared.decision.plan.time_limit_s,
        overrides=[redact(item) for item in request.overrides],
    )
    return job_id


def _start_on_slurm(prepared: "Prepared") -> str:
    from r1hpc.slurm.submission import submit

    return submit(prepared.run, prepared.decision.plan.topology.world_size)


def _start_here(run: "RunDir") -> str:
    """Start the local supervisor so that it outlives this terminal."""
    from r1hpc.slurm.environment import without_foreign_ranks

    environment = {
        **without_foreign_ranks(os.environ),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(run.code), os.environ.get("PYTHONPATH")])),
        "PYTHONSAFEPATH": "1",
    }
    with (run.logs / "local.out").open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-u", "-m", "r1hpc.launch", "local", str(run.path)],
            cwd=run.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return f"local-{supervisor.pid}"


def _prepare_inside_job(request: _Request) -> int:
    """For sbatch/train.sh: make this job's run folder, or find it again; print its ranks and path."""
    from r1hpc.base.files import write_atomic
    from r1hpc.config import load
    from r1hpc.slurm import decide, env, script
    from r1hpc.telemetry.attempts import read_history, record

    job_id = env.job_id(os.environ)
    if job_id is None:
        raise UsageError("--prepare-only belongs to sbatch/train.sh and runs inside a job")
    run = _place(request.arguments, request.arguments.run_name)
    if run.config.is_file() and any(s.get("job_id") == job_id for s in read_history(run).submissions):
        config = load.read(run.config)  # a requeued job: nothing is decided again
        print(script.ranks_per_node(config, config.resources.gpus_per_node or 0), run.path)
        return 0
    source = run.config if request.arguments.resume else request.job or _DEFAULT_JOB
    asked = load.load(source, request.overrides, request.arguments.cluster)
    actual = decide.overrides_of_allocation(os.environ, is_cpu_run=asked.resources.gpus_per_node == 0)
    request = dataclasses.replace(
        request,
        overrides=(*request.overrides, *actual),
        arguments=argparse.Namespace(**{**vars(request.arguments), "executor": "slurm"}),
    )
    if _is_half_made(run):
        shutil.rmtree(run.path)  # this job was preempted while it made it
    prepared = _resume(request) if request.arguments.resume else _fresh(request)
    direct = dataclasses.replace(prepared.script, by_submitit=False)
    prepared = dataclasses.replace(prepared, script=direct)
    if not request.arguments.resume:
        _create(run)
    try:
        _freeze(prepared, request)
        write_atomic(run.path / "site.sh", script.site_lines(direct.setup, direct.environment))
    except (R1hpcError, OSError):
        if not request.arguments.resume:
            shutil.rmtree(run.path)
        raise
    _remove_switches(run)
    record(
        run,
        "submitted",
        executor="slurm",
        job_id=job_id,
        script=str(run.script),
        time_limit_s=prepared.decision.plan.time_limit_s,
    )
    for note in prepared.notes:
        print(note, file=sys.stderr)
    print(direct.ranks_per_node, run.path)
    return 0


def _is_half_made(run: "RunDir") -> bool:
    """Whether the folder is one of ours that was never submitted: no event, no checkpoint."""
    ours = run.logs.is_dir() and run.checkpoints.is_dir() and run.ledger.is_dir()
    return ours and not run.attempts.exists() and not any(run.checkpoints.iterdir())


def _remove_switches(run: "RunDir") -> None:
    """Those of an earlier submission: asking for the run again takes them back."""
    for switch in (run.stop, run.save, run.finished):
        switch.unlink(missing_ok=True)


if __name__ == "__main__":
    run_door(main)
