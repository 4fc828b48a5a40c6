"""Settings of a server: stage serve, whose model is `model.path`."""

import ipaddress
import socket
from contextlib import suppress
from dataclasses import dataclass, field

from r1hpc.base.errors import ConfigError
from r1hpc.config.checks import ranged

_OURS = {
    "--model": "model.path",
    "--served-model-name": "serve.model_name",
    "--host": "serve.host",
    "--port": "serve.port",
    "--dtype": "serve.dtype",
    "--max-model-len": "serve.max_model_len",
    "--tensor-parallel-size": "resources.gpus_per_node",
    "-tp": "resources.gpus_per_node",
}
"""Words of vLLM that stand for a setting here."""
_CLOSED = (
    *("--api-key", "--middleware", "--root-path", "--uds", "--config", "--api-server-count", "--headless"),
    *(
        "--ssl-keyfile",
        "--ssl-certfile",
        "--data-parallel-external-lb",
        "--data-parallel-hybrid-lb",
        "--omni",
    ),
)
"""Words of vLLM by which it would be reached past the key, or not at all."""


@dataclass(frozen=True)
class ServeConfig:
    """vLLM's OpenAI server on a node of one's own: `python -m r1hpc.serve RUN|FOLDER` (docs/serving.md)."""

    idle_minutes: float = ranged(30.0, least=0)
    """The server ends after so many minutes without a request. 0: only at its time limit."""
    start_minutes: float = ranged(30.0, above=0)
    """Loading and compiling may take so long; a server that does not answer by then has failed."""
    model_name: str | None = None
    """The name clients ask for. None: that of the run, or of the folder."""
    host: str | None = None
    """The address it listens on. None: the node's own, on the way to where the job was submitted; on this
    machine 127.0.0.1. All of a node's addresses at once are refused."""
    port: int | None = ranged(None, least=1024, most=65535)
    """None: a free one."""
    dtype: str = ranged("auto", choices=("auto", "bfloat16", "float16", "float32"))
    """Of weights and arithmetic. auto: the folder's; vLLM takes 16 bits for one in fp32."""
    max_model_len: int | None = ranged(None, least=1)
    """Tokens of a prompt and its completion. None: the model's positions."""
    python: str | None = None
    """The interpreter that has vLLM, or words that start one. None: that of the job."""
    options: list[str] = field(default_factory=list)
    """Further words for vLLM's server, such as --max-num-seqs=64."""

    def __post_init__(self) -> None:
        if self.host is not None and not self.host.isprintable():
            raise ConfigError(f"serve.host={self.host!r} is no name or address of a node")
        if self.host is not None and _is_every_address(self.host.strip("[]")):
            raise ConfigError(
                f"serve.host={self.host!r} is every address of a node, and others are on its networks too: "
                "name one, or leave it out for the node's own"
            )
        for word in self.options:
            _check_option(word.partition("=")[0].replace("_", "-"))


def _is_every_address(host: str) -> bool:
    """0.0.0.0 and ::, in any of the spellings that a socket takes."""
    if host in ("", "*"):
        return True
    with suppress(OSError):
        return not any(socket.inet_aton(host))  # 0, 0x0, 0.0
    with suppress(ValueError):
        address = ipaddress.ip_address(host)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_unspecified
    return False


def _check_option(name: str) -> None:
    """vLLM takes the beginning of an option for the whole, as argparse does."""
    for ours, setting in _OURS.items():
        if ours.startswith(name) and name.startswith("-t" if ours == "-tp" else "--"):
            raise ConfigError(f"serve.options holds {name}: set {setting} in its place")
    for closed in _CLOSED:
        if name.startswith("--") and closed.startswith(name):
            raise ConfigError(
                f"serve.options holds {name}: by {closed} the server would be reached past its key, or not "
                "at all; leave it out"
            )
