"""Where a server is to be found, and its key: two files in the run folder, for its user alone.

key = make_key(run)                       # once; the next attempt has the same
write_address(run, Address(...));  read_address(run);  forget_address(run)
"""

import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from r1hpc.base.files import check_owned, read_object, write_atomic, write_json
from r1hpc.base.run_dir import RunDir


@dataclass(frozen=True)
class Place:
    """Where a server listens."""

    host: str
    """An address, or a name that stands for one."""
    port: int
    node: str

    @property
    def url(self) -> str:
        """What OpenAI's clients call base_url, without the /v1."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True)
class Address:
    """A server that answers."""

    place: Place
    model: str
    """The name clients ask for."""
    attempt: int


def make_key(run: RunDir) -> Path:
    """The file with the run's key, made where there is none yet.

    Raises:
        StateError: somebody else could have written it.
    """
    run.server.mkdir(mode=0o700, exist_ok=True)
    path = run.server_key
    if not path.exists() or not path.stat().st_size:  # empty: left by a disk that was full
        write_atomic(path, f"{secrets.token_urlsafe(32)}\n")
    check_owned(path)
    return path


def read_key(run: RunDir) -> str:
    """The key itself."""
    return run.server_key.read_text().strip()


def write_address(run: RunDir, address: Address) -> None:
    """Tell where the server is: it answers now."""
    write_json(run.server_address, asdict(address))


def read_address(run: RunDir) -> Address | None:
    """Where the server is; None: none answers, as far as the run folder knows."""
    found = read_object(run.server_address, Address)
    if not found:
        return None
    place = Place(**{each.name: found["place"][each.name] for each in fields(Place)})
    return Address(place, found["model"], found["attempt"])


def forget_address(run: RunDir) -> None:
    """It does not answer any more."""
    run.server_address.unlink(missing_ok=True)
