"""Say who leads the training loop of a script: before the queue as a promise, in a run as it was seen.

promise(script, look_of(script))                      # for submit, doctor and the first line of the log
leader = note_leader(run, config, attempt, leader)    # rank 0, every few seconds
seen(run, config, attempt)                            # for status
"""

import shlex
import sys
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_object
from r1hpc.base.run_dir import RunDir
from r1hpc.client.job import report_path, unled_path
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.schema.sections import ScriptConfig
from r1hpc.script.look import Look, look_at
from r1hpc.telemetry.records.attempts import record

_PROMISES = {
    "r1hpc": "it uses r1hpc.client",
    "transformers": "transformers' Trainer stops at a step's end and resumes to the bit",
    "lightning": "Lightning stops at a step's end and resumes to the bit",
    "accelerate": "Accelerate's save_state is committed by one rename; the script loads it itself",
}


def look_of(script: ScriptConfig) -> Look:
    """Look at a script of the configuration. Raise UsageError if there is none."""
    path = Path(str(script.path))
    if not path.is_file():
        raise UsageError(f"there is no script {path}")
    if path.suffix != ".py":
        return Look()
    found = look_at(path, Path(script.cwd or ".").absolute() if script.module else None)
    words = shlex.split(script.python or "")
    if found.library and "-m" in words[:-1]:
        found.doubts.append(f"script.python runs {words[words.index('-m') + 1]}, which runs the script")
    return found


def promise(script: ScriptConfig, found: Look) -> str:
    """Return what a preemption costs this script, as far as its source tells."""
    if not found.library:
        return own_promise(script)
    if not found.doubts:
        return _PROMISES[found.library]
    why = "; ".join(found.doubts[:2])
    return (
        f"not known before its first step whether r1hpc leads its loop ({why}). If it does not, "
        f"{own_promise(script)}"
    )


def own_promise(script: ScriptConfig) -> str:
    """Return what becomes of a script whose loop r1hpc does not lead."""
    if not script.checkpoints:
        return "it has no checkpoints: it begins anew after each preemption"
    if gets_checkpoint(script):
        return "its newest complete checkpoint is passed on"
    return (
        "after a preemption it must find its newest checkpoint by itself; if it does not, add "
        "-- --resume {checkpoint}, or script.resume_args"
    )


def gets_checkpoint(script: ScriptConfig) -> bool:
    """True if its arguments hold the checkpoint to resume from."""
    return bool(script.resume_args) or any("{checkpoint}" in word for word in script.args)


def seen(run: RunDir, config: RunConfig, attempt: int) -> str:
    """Return who leads the loop of an attempt; empty before rank 0 took a step."""
    leader = read_object(report_path(run, attempt, 0)).get("leader")
    if leader:
        return f"led by {leader}"
    unled = read_object(unled_path(run, attempt, 0))
    if not unled:
        return ""
    where = "" if unled.get("is_script") else " (it trains in a process of its own)"
    signal = f"a preemption sends SIG{config.script.stop_signal} to its processes"
    return f"not led by r1hpc{where}: {signal}; {own_promise(config.script)}"


def note_leader(run: RunDir, config: RunConfig, attempt: int, before: str) -> str:
    """Return who leads the loop of an attempt; record and print it if it was somebody else `before`."""
    now = seen(run, config, attempt)
    if now and now != before:
        record(run, "loop", attempt=attempt, detail=now)
        print(f"r1hpc: the loop is {now}", file=sys.stderr, flush=True)
    return now or before
