"""Convert a checkpoint for another number of ranks: DeepSpeed's universal form, in a scratch folder.

convert(checkpoint.path / "deepspeed", target, zero_stage=1, beat=watchdog.beat)     # the original stays
"""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from r1hpc.train.checkpoint.deepspeed_io import load_file, write_file
from r1hpc.train.checkpoint.shards import PREFIX, part_name
from r1hpc.train.parallel.errors import ConversionError, ResumeError

_POLL_S = 0.2
_NO_ROOM = ("MemoryError", *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO)))
_PHASE = "converting the checkpoint for another number of ranks"


def convert(source: Path, target: Path, zero_stage: int, beat: Callable[[str], None]) -> None:
    """Write the universal form of DeepSpeed's files in `source`; replaces an unfinished one.

    A large model takes longer than a rank may be silent, so `beat` is called all the while.

    Raises:
        ConversionError: DeepSpeed was killed, or had no room or memory; its output is on stderr, the end in
            the message.
        ResumeError: the same, if it could not read the checkpoint.
        OSError: no room for the scratch folder.
    """
    for leftover in target.parent.parent.glob("universal-*"):  # of a killed conversion
        shutil.rmtree(leftover, ignore_errors=True)
    target.parent.mkdir(mode=0o700)
    try:
        _convert(source, target, zero_stage, beat)
    except BaseException:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise


def _convert(source: Path, target: Path, zero_stage: int, beat: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(_joined(source, target.parent, beat)), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    if zero_stage < 3:
        command += ["--inject_missing_state"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    log = target.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=clean)
    try:
        while process.poll() is None:
            beat(_PHASE)
            time.sleep(_POLL_S)
    finally:
        process.kill()  # it must not write on into a folder that is removed
        process.wait()
    if process.returncode:
        said = log.read_text(errors="replace")
        print(said, file=sys.stderr, flush=True)
        how = f"status {process.returncode}" if process.returncode > 0 else f"signal {-process.returncode}"
        is_of_the_machine = process.returncode < 0 or any(words in said for words in _NO_ROOM)
        kind = ConversionError if is_of_the_machine else ResumeError
        raise kind(f"DeepSpeed could not convert {source.parent} ({how}):\n{said[-2000:]}")


def _joined(folder: Path, scratch: Path, beat: Callable[[str], None]) -> Path:
    """Return `folder` as DeepSpeed's converter reads it: a copy with joined weights if they are in parts."""
    if not (folder / part_name(0)).exists():
        return folder
    joined = scratch / "joined"
    joined.mkdir(mode=0o700)
    for path in folder.iterdir():
        beat(_PHASE)
        if path.name.startswith("mp_rank_"):
            write_file(joined / path.name, load_file(path))
        elif not path.name.startswith(PREFIX):
            (joined / path.name).symlink_to(path.resolve())
    return joined
