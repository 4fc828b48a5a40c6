"""Record the GPU readings of a node in metrics/gpu-<node>.jsonl, from one thread per node.

Lines of the file:
    {"event": "devices", "time", "node", "attempt", "period_s", "source", "driver", "notes", "gpus": [...]}
        once per start: the static fields (gpu.nvml.STATIC)
    {"time", "node", "attempt", "source", "gpus": [{"uuid", ...}]}
        every period: gpu.nvml.CHANGING; null if a GPU does not have that reading. The fields of
        gpu.nvml.LINKS are there every `link_every` ticks, for one GPU after another.
    {"event": "no_driver", "time", "node", "attempt", "message"}
        instead of both if there is no driver

`source` is "stub" if the readings come from the test library: these numbers mean nothing.

Start one sampler per node, in a process that sees all of the job's GPUs there: if each rank is bound to one
GPU (one entry in CUDA_VISIBLE_DEVICES) it samples only that one.
"""

import contextlib
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from r1hpc.base.failpoints import failpoint
from r1hpc.telemetry.gpu.nvml import NoDriverError, Nvml, open_nvml

MIN_PERIOD_S = 0.5
"""NVML renews power about every 0.494 s (measured by Cuuper22/gpu_stack-); faster sampling shows no more."""

_log = logging.getLogger(__name__)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

# Signals of the training process are for its main thread alone.
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}


class GpuSampler:
    """Samples in a daemon thread: it never keeps the process alive, and its failures never end training."""

    def __init__(
        self, path: Path, node: str, attempt: int, period_s: float = 1.0, link_every: int = 10
    ) -> None:
        """Append to `path`, whose folder exists, every `period_s` seconds, at least MIN_PERIOD_S.

        PCIe and NVLink of a GPU are read every `link_every` ticks, 0 for never. Reading PCIe blocks for 40 ms
        per GPU on real hardware, so the GPUs take turns.
        """
        self.path = path
        self.node = node
        self.attempt = attempt
        self.period_s = max(MIN_PERIOD_S, period_s)
        self.link_every = link_every
        self.message: str | None = None
        """Why sampling is off, if it is."""
        self._ticks = 0
        self._fd = -1
        self._nvml: Nvml | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> str | None:
        """Start sampling. Return None, or one plain sentence on why there will be no GPU metrics."""
        if self.open() is None:
            self._thread = threading.Thread(target=self._run, name="gpu-sampler", daemon=True)
            self._thread.start()
        return self.message

    def stop(self, timeout_s: float = 2.0) -> None:
        """Stop after the current tick. A driver that hangs longer than `timeout_s` is left alone."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                _log.warning("the GPU sampler of %s hangs in a call of the NVIDIA driver", self.node)
                return
        self.close()

    def open(self) -> str | None:
        """Open NVML and the file, and write the first line; `start` calls it before its thread."""
        try:
            self._nvml = open_nvml()
        except NoDriverError as error:
            self._off(str(error))
            with contextlib.suppress(OSError):
                self._write({"event": "no_driver", **self._stamp(), "message": self.message})
            self.close()
            return self.message
        header = {
            "event": "devices",
            **self._stamp(),
            "period_s": self.period_s,
            "source": self._nvml.source,
            "driver": self._nvml.driver,
            "notes": self._nvml.notes,
            "gpus": [device.static() for device in self._nvml.devices],
        }
        try:
            self._write(header)
        except OSError as error:
            self._cannot_write(error)
            self.close()
        return self.message

    def tick(self) -> None:
        """Sample once and append one line. An OSError of the file passes to the caller."""
        assert self._nvml is not None, "tick() comes after open()"
        gpus = [
            device.sample(links=self.link_every > 0 and (self._ticks - turn) % self.link_every == 0)
            for turn, device in enumerate(self._nvml.devices)
        ]
        self._ticks += 1
        self._write({**self._stamp(), "source": self._nvml.source, "gpus": gpus})

    def close(self) -> None:
        """Release NVML and the file. Repeating it is harmless."""
        if self._fd >= 0:
            # Some network file systems report a full disk only here; the ticks are not worth an error.
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        due = time.monotonic()
        while not self._stopping.is_set():
            try:
                self.tick()
            except OSError as error:
                self._cannot_write(error)
                return
            # A tick that took longer than its period skips the ones it missed.
            due = max(due + self.period_s, time.monotonic())
            self._stopping.wait(due - time.monotonic())

    def _stamp(self) -> dict[str, Any]:
        return {"time": time.time(), "node": self.node, "attempt": self.attempt}

    def _write(self, record: dict[str, Any]) -> None:
        """Append one line. Not synced: a power cut may lose the last seconds of samples."""
        line = _encode(record).encode() + b"\n"
        failpoint("gpu_metrics.write")
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a torn line
                line = b"\n" + line
        while line:
            line = line[os.write(self._fd, line) :]

    def _cannot_write(self, error: OSError) -> None:
        why = error.strerror or error
        self._off(f"cannot write {self.path} ({why}); GPU metrics are off, training continues")

    def _off(self, message: str) -> None:
        self.message = message
        _log.warning("%s", message)
