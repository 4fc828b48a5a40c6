"""Store a server's address and key: two files in the run folder, readable only by its user.

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
    """Host and port of a server."""

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
    """Return the file with the run's key; make it if there is none.

    Raises:
        StateError: another user could have written it.
    """
    run.server.mkdir(mode=0o700, exist_ok=True)
    path = run.server_key
    if not path.exists() or not path.stat().st_size:  # empty: left by a full disk
        write_atomic(path, f"{secrets.token_urlsafe(32)}\n")
    check_owned(path)
    return path


def read_key(run: RunDir) -> str:
    """Return the key itself."""
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
