"""A checkpoint for another number of ranks: DeepSpeed's universal form of it, made in a scratch folder.

convert(checkpoint.path / "deepspeed", target, zero_stage=1)     # the original stays as it is
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from r1hpc.train.checkpoint_files import load_file, write_file
from r1hpc.train.errors import ResumeError
from r1hpc.train.weight_parts import PREFIX, part_name


def convert(source: Path, target: Path, zero_stage: int) -> None:
    """Write the universal form of what DeepSpeed saved in `source`; takes the place of one that was begun.

    Raises:
        ResumeError: DeepSpeed could not; with what it said.
    """
    for leftover in target.parent.parent.glob("universal-*"):  # of a conversion that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    target.parent.mkdir(mode=0o700)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(_joined(source, target.parent)), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    if zero_stage < 3:
        command += ["--inject_missing_state"]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    if done.returncode:
        raise ResumeError(f"DeepSpeed could not convert {source.parent}:\n{done.stderr[-2000:]}")


def _joined(folder: Path, scratch: Path) -> Path:
    """`folder` as DeepSpeed's converter reads it: a copy with the weights whole, where they are in parts."""
    if not (folder / part_name(0)).exists():
        return folder
    joined = scratch / "joined"
    joined.mkdir(mode=0o700)
    for path in folder.iterdir():
        if path.name.startswith("mp_rank_"):
            write_file(joined / path.name, load_file(path))
        elif not path.name.startswith(PREFIX):
            (joined / path.name).symlink_to(path.resolve())
    return joined
