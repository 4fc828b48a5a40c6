"""A file that cannot be written: the error is the file system's, not what torch makes of it."""

import errno
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from r1hpc.train.checkpoint import deepspeed_io
from r1hpc.train.checkpoint.deepspeed_io import write_file


class _OverQuota:
    """A file on which the user has used up what he was given; no such file system can be had here."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_full_disk_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        write_file(Path("/dev/full"), {"weight": torch.zeros(1 << 16)})
    assert raised.value.errno == errno.ENOSPC


def test_what_torch_says_of_a_failed_write_is_not_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = deepspeed_io._Pieces
    monkeypatch.setattr(
        deepspeed_io,
        "_Pieces",
        lambda file, stop, wrote: pieces(_OverQuota(file), stop, wrote),  # type: ignore[arg-type]
    )
    with pytest.raises(OSError, match="Disk quota exceeded"):
        write_file(tmp_path / "a.pt", {"weight": torch.zeros(1 << 16)})
