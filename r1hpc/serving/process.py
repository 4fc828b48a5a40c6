"""Start vLLM's server as a child process, count its requests and end it. life.py decides when.

with started(command_of(...), environment_of(...), place) as server:
    server.ask("/health", key)      # the HTTP status; None: it does not answer
    server.news()                   # answers begun and ended since the last call
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.config.schema.run import RunConfig
from r1hpc.serving.address import Place
from r1hpc.serving.client import Client
from r1hpc.serving.vllm_server import ACTIVITY, BEGIN, END, KEY_FILE

_SERVER, _GATE = "r1hpc.serving.vllm_server", "r1hpc.serving.vllm_server.Gate"
_TO_LEAVE_S = 10.0
"""From TERM to KILL, for answers in progress; shorter than any KillWait."""
_PIPE_BYTES = 65536
_ON_CPU = ("--enforce-eager", "--no-enable-chunked-prefill")
"""As for rollouts (vllm_engine.py): no minutes of compiling, and no crash on a seeded prompt read in two."""
_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    # For the CPU build: a GiB for the cache, threads as in OMP_NUM_THREADS.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Used for variables that are not set."""


@dataclass
class Server(Client):
    """The running process, and the pipe on which its gate counts."""

    process: "subprocess.Popen[bytes]"
    _activity: int

    def status(self) -> int | None:
        """Return its exit status; None while it lives."""
        return self.process.poll()

    def news(self) -> tuple[int, int]:
        """Return (answers begun, answers ended) since the last call."""
        told = b""
        with suppress(BlockingIOError):
            while part := os.read(self._activity, _PIPE_BYTES):
                told += part
        return told.count(BEGIN), told.count(END)

    def end(self) -> None:
        """Ask it, its engine and its workers to exit; kill those that do not."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_TO_LEAVE_S)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], place: Place) -> Iterator[Server]:
    """Run the server in a process group of its own, which has ended afterwards. It prints where this prints.
    Raise UsageError if its interpreter cannot be started."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    try:
        process = subprocess.Popen(
            command,
            env={**environment, ACTIVITY: str(writing)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,
        )
    except OSError as error:
        os.close(reading)
        raise UsageError(
            f"cannot start {command[0]} ({error.strerror}): name a python that has vLLM by serve.python"
        ) from None
    finally:
        os.close(writing)
    server = Server(place.url, process, reading)
    try:
        yield server
    finally:
        server.end()
        os.close(reading)


def command_of(config: RunConfig, python: Sequence[str], place: Place, model_name: str) -> list[str]:
    """Return the command of vLLM's server; `python` starts an interpreter if serve.python is not set."""
    serve, path = config.serve, config.model.path
    assert path is not None, "the schema refuses a server without"
    length = [f"--max-model-len={serve.max_model_len}"] if serve.max_model_len is not None else []
    on_cpu = () if config.resources.gpus_per_node else _ON_CPU
    return [
        *(serve.python.split() if serve.python else python),
        *("-u", "-m", _SERVER, "--model", path, "--served-model-name", model_name),
        *("--host", place.host, "--port", str(place.port)),
        *("--middleware", _GATE, "--disable-uvicorn-access-log"),
        *("--tensor-parallel-size", str(config.resources.gpus_per_node or 1), "--dtype", serve.dtype),
        *on_cpu,
        *length,
        *serve.options,
    ]


def environment_of(environ: Mapping[str, str], code: Path, key_file: Path) -> dict[str, str]:
    """Return the server's environment: the rank's, with the run's frozen code. Leaves out variables that open
    routes, and those of this rank's identity: vLLM has ranks of its own."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "VLLM_API_KEY")
    kept = {name: value for name, value in environ.items() if name not in foreign}
    paths = [str(code), *filter(None, [environ.get("PYTHONPATH")])]
    return {
        **_DEFAULTS,
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_SERVER_DEV_MODE": "0",
        KEY_FILE: str(key_file),
    }
