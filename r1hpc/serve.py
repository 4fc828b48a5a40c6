"""Serve a model over HTTP with OpenAI's interface, as its own job.

    python -m r1hpc.serve RUN                        # a run's model; CHAIN/STAGE is a run
    python -m r1hpc.serve DIR --gpus 2 -t 08:00:00   # any Hugging Face folder
    python -m r1hpc.serve DIR --idle 60 --python ~/vllm/bin/python
    python -m r1hpc.serve SERVER                     # the address of an existing server

Runs vLLM's server on a node, behind a key that only you can read. The command waits until it answers, then
prints its address, the file with its key, and how to reach it from elsewhere. Ctrl-C ends the waiting, not
the server. The server ends after --idle minutes without a request, at its time limit, or by `python -m
r1hpc.cancel SERVER`; after a preemption it comes back with the same key. See docs/serving.md.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import RUN_NAMES, choose_run, model_of
from r1hpc.base.cli import ArgumentParser, offer, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir

if TYPE_CHECKING:
    from r1hpc.serving.address import Address

_JOB = "serve"


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    os.umask(0o077)
    out = sys.stderr if arguments.json else sys.stdout  # stdout is for the JSON object
    is_folder = (Path(arguments.model) / "config.json").is_file()
    run = None if is_folder else choose_run(arguments.model, arguments.run_root)
    from r1hpc.config.load import read
    from r1hpc.serving.address import await_server

    if run is not None and read(run.config).stage == "serve":
        _refuse_changes(run, arguments)
    else:
        run = _submit(run, arguments, argv, out)
        if run is None or arguments.no_wait:
            return 0

    try:
        address = await_server(run, out)
    except KeyboardInterrupt:
        print(f"\nno longer waiting; for its address: python -m r1hpc.serve {run.path}", file=sys.stderr)
        return 130
    shown = {  # the key itself is never printed
        "run_id": run.run_id,
        "run_dir": str(run.path),
        "url": address.place.url,
        "model": address.model,
        "key_file": str(run.server_key),
        "node": address.place.node,
        "attempt": address.attempt,
        "ssh": _ssh(address),
    }
    print_result(shown, _as_text(run, address), arguments.json)
    return 0


def _parser() -> ArgumentParser:
    from r1hpc.slurm.flags import add_submission_flags

    parser = ArgumentParser(prog="python -m r1hpc.serve", description=__doc__)
    model = parser.add_argument("model", metavar="RUN|DIR", help="a run, a Hugging Face folder, or a server")
    offer(model, RUN_NAMES)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="dotted overrides")
    parser.add_argument("--gpus", metavar="N", type=int, help="GPUs the model is divided over (1); 0: CPU")
    parser.add_argument("--idle", metavar="MIN", type=float, help="end after so long without a request (30)")
    parser.add_argument("--python", metavar="PYTHON", help="the interpreter that has vLLM")
    parser.add_argument("--no-wait", action="store_true", help="submit, and do not wait until it answers")
    parser.add_argument("--run-name", metavar="NAME", help="of the server; default serve-DATE-TIME-XXXX")
    add_submission_flags(parser, leave_out=("--nodes", "--gpus-per-node"))
    return parser


def _refuse_changes(run: RunDir, arguments: argparse.Namespace) -> None:
    """Refuse options for an existing server: only its address can be shown."""
    plain = vars(_parser().parse_intermixed_args([arguments.model]))
    told = ("run_root", "json")
    if any(getattr(arguments, name) != value for name, value in plain.items() if name not in told):
        raise UsageError(
            f"{run.run_id} is a server already, which other flags and settings would not change: leave them "
            "out to be told its address; to begin another one, name the model"
        )


def _submit(
    run: RunDir | None, arguments: argparse.Namespace, argv: Sequence[str], out: Any
) -> RunDir | None:
    """Submit the server of a run's model, or of a folder's; print how to follow it. None after a dry run."""
    from r1hpc import api
    from r1hpc.slurm.flags import submission_options

    overrides, options = _overrides(run, arguments), submission_options(arguments)
    submission = api.submit(_JOB, overrides=overrides, argv=argv, **options)
    assert isinstance(submission, api.Submission), "jobs/serve.yaml is no chain"
    if arguments.json and (arguments.dry_run or arguments.no_wait):
        submission.print(as_json=True)
    else:
        from r1hpc.submission.text import run_as_text

        print(run_as_text(submission.planned, submission.job_id), file=out, flush=True)
    return None if arguments.dry_run else submission.planned.run


def _overrides(run: RunDir | None, arguments: argparse.Namespace) -> list[str]:
    """Return overrides, the last wins: SBATCH_* variables, our own flags, KEY=VALUE, sbatch's flags."""
    from r1hpc.checkpoint.finished import check_folder
    from r1hpc.slurm.flags import all_overrides

    bare = [word for word in arguments.words if "=" not in word]
    if bare:
        raise UsageError(f"one model is served, and {bare[0]} is another: leave it out")
    if run is None:
        folder = Path(arguments.model).absolute()
        name = folder.name
    else:
        folder, name = model_of(run, "serve"), run.run_id
    check_folder(folder)
    chosen = {
        "model.path": str(folder),
        "serve.model_name": name,
        "resources.gpus_per_node": arguments.gpus,
        "serve.idle_minutes": arguments.idle,
        "serve.python": arguments.python,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    return all_overrides([*given, *arguments.words], arguments)


def _as_text(run: RunDir, address: "Address") -> str:
    url = f"{address.place.url}/v1"
    # On curl's command line every user of the login node would read it.
    header = f"sed 's/^/Authorization: Bearer /' {shlex.quote(str(run.server_key))}"
    return "\n".join(
        [
            f"{address.model} answers at {url}",
            f"key      {run.server_key} (for you alone)",
            f"ask      {header} | curl -H @- {url}/models",
            f"laptop   {_ssh(address)}",
            f"         then http://127.0.0.1:{address.place.port}/v1 there",
            f"status   python -m r1hpc.status {run.path}",
            f"end      python -m r1hpc.cancel {run.path}",
        ]
    )


def _ssh(address: "Address") -> str:
    """Return the ssh command that forwards the server's port to another machine through this one."""
    import getpass
    import socket

    place = address.place
    host = f"[{place.host}]" if ":" in place.host else place.host
    return f"ssh -N -L {place.port}:{host}:{place.port} {getpass.getuser()}@{socket.getfqdn()}"


if __name__ == "__main__":
    run_command(main)
