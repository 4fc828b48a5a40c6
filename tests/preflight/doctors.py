"""The doctor as a user calls it: found = doctor(run_root, "--nodes", "1", status=1); bad(found)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Findings = dict[str, dict[str, str]]


def doctor(root: Path, *words: str, status: int = 0, **env: Any) -> Findings:
    """The findings of the command by check; those that are not ok win over those that are."""
    done = subprocess.run(
        [sys.executable, "-m", "r1hpc.doctor", "--run-root", str(root), "--json", *words],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    found = json.loads(done.stdout)["findings"]
    assert all(set(each) == {"check", "state", "detail", "fix"} for each in found)
    assert all(each["fix"] for each in found if each["state"] in ("warn", "fail"))
    return {each["check"]: each for each in sorted(found, key=lambda each: str(each["state"] != "ok"))}


def bad(found: Findings) -> dict[str, str]:
    """What is not well; the disk of a busy machine may be slow, which is judged by itself below."""
    states = {name: each["state"] for name, each in found.items() if name != "run root speed"}
    return {name: state for name, state in states.items() if state in ("warn", "fail")}
