"""Store a server's address and key in the run folder, readable only by its user, and wait until it answers.

life.py writes them in the job; the commands serve, loadtest and status read them.

key = make_key(run)                       # once; the next attempt has the same
write_address(run, Address(...));  read_address(run);  forget_address(run)
address = await_server(run, sys.stdout)   # with an occasional line of progress
"""

import secrets
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

from r1hpc.attempt.state.logs import clean, tail
from r1hpc.attempt.state.state import Situation, State, read_situation
from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.files import check_owned, read_object, write_atomic, write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.base.units import format_duration
from r1hpc.config.load import read

_POLL_S = 0.5
_ASK_SLURM_EVERY_S = 10.0
_SHOWN_LINES = 15
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Place:
    host: str
    """An address, or a name that resolves to one."""
    port: int
    node: str

    @property
    def url(self) -> str:
        """Return the base_url of OpenAI's clients, without the /v1."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Address:
    """Address of a server that answers."""

    place: Place
    model: str
    """The name clients request."""
    attempt: int


def make_key(run: RunDir) -> Path:
    """Return the file with the run's key, made if missing. Raise StateError if others can write it."""
    run.server.mkdir(mode=0o700, exist_ok=True)
    path = run.server_key
    if not path.exists() or not path.stat().st_size:  # empty: left by a full disk
        write_atomic(path, f"{secrets.token_urlsafe(32)}\n")
    check_owned(path)
    return path


def read_key(run: RunDir) -> str:
    return run.server_key.read_text().strip()


def write_address(run: RunDir, address: Address) -> None:
    """Record the server's address: it answers now."""
    write_json(run.server_address, asdict(address))


def read_address(run: RunDir) -> Address | None:
    """Return the server's address; None if none answers, as far as the run folder knows."""
    found = read_object(run.server_address, Address)
    if not found:
        return None
    place = Place(**{each.name: found["place"][each.name] for each in fields(Place)})
    return Address(place, found["model"], found["attempt"])


def forget_address(run: RunDir) -> None:
    """Remove the address: the server no longer answers."""
    run.server_address.unlink(missing_ok=True)


class NoServerError(R1hpcError):
    """The server is over; the message holds the last lines of its log."""


def await_server(run: RunDir, out: TextIO) -> Address:
    """Return a server's address once it answers; raise NoServerError if it ended before, or long ago."""
    began, said = time.monotonic(), ""
    while True:
        address = read_address(run)
        situation = read_situation(run)
        if address is not None and _is_of_now(address, situation):
            return address
        if situation.state.is_over or situation.job is None:
            raise NoServerError(_why_over(run, situation))
        line = _progress(run, situation)
        if line != said:
            print(f"{format_duration(time.monotonic() - began):>8}  {line}", file=out, flush=True)
            said = line
        _wait_for_news(run, situation, address)


def address_now(run: RunDir) -> Address:
    """Return the address of a server that answers now. Raise UsageError if the run is no server,
    NoServerError if it does not answer yet, or any more."""
    if read(run.config).stage != "serve":
        raise UsageError(
            f"{run.run_id} is no server: python -m r1hpc.serve {run.path} begins one for its model"
        )
    address, situation = read_address(run), read_situation(run)
    if address is not None and _is_of_now(address, situation):
        return address
    if situation.state.is_over or situation.job is None:
        raise NoServerError(_why_over(run, situation))
    raise NoServerError(
        f"{run.run_id} does not answer yet ({_progress(run, situation)}): python -m r1hpc.serve {run.path} "
        "waits until it does"
    )


def _is_of_now(address: Address, situation: Situation) -> bool:
    """True if it is of the running attempt; a killed one could not remove its own."""
    last = situation.history.last
    return situation.state is State.running and last is not None and address.attempt == last.attempt


def _wait_for_news(run: RunDir, situation: Situation, known: Address | None) -> None:
    """Wait until it answers or the run must be checked again; seldom, because slurmctld serves everybody."""
    is_slurm = situation.job is not None and situation.job.is_slurm
    deadline = time.monotonic() + (_ASK_SLURM_EVERY_S if is_slurm else _POLL_S)
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if read_address(run) != known or run.finished.exists():
            return


def _progress(run: RunDir, situation: Situation) -> str:
    if situation.state is not State.running or situation.history.last is None:
        detail = f" ({situation.detail})" if situation.detail else ""
        return f"{situation.state.value}{detail}"
    lines = _last_lines(run, situation, 1)
    node = ", ".join(situation.history.last.node_names)
    return f"starting on {node}" + (f": {lines[-1][:_SHOWN_CHARACTERS]}" if lines else "")


def _why_over(run: RunDir, situation: Situation) -> str:
    last = situation.history.last
    if situation.state is State.finished:
        why = last.detail if last is not None else ""
        return f"{run.run_id} has ended{f' ({why})' if why else ''}: begin another one for its model"
    cause = f"{last.cause.value}: {last.detail}" if last is not None and last.cause is not None else ""
    why = situation.detail or cause or "no attempt began"
    lines = "".join(f"\n  {line}" for line in _last_lines(run, situation, _SHOWN_LINES))
    shown = f"\nthe end of its log:{lines}" if lines else ""
    return f"{run.run_id} does not answer: it is {situation.state.value} ({why}){shown}\nsee {run.logs}"


def _last_lines(run: RunDir, situation: Situation, count: int) -> list[str]:
    last = situation.history.last
    log = run.rank_log(last.attempt, 0) if last is not None else None
    return [] if log is None or not log.is_file() else [clean(line) for line in tail(log, count)]
