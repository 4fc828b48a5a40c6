"""The `script` workload: check a script before the queue, estimate its hours, run it on each rank."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.attempt.workload import (
    REPORTS_NO_STEPS,
    Checked,
    Facts,
    Outcome,
    RankJob,
    Workload,
    refuse_without,
)
from r1hpc.base.cli import LAUNCHERS
from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_object, write_json
from r1hpc.base.names import nearest
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig
from r1hpc.config.schema.sections import ScriptConfig
from r1hpc.script.checkpoints import newest_checkpoint, note_earlier
from r1hpc.script.launcher import MODULES
from r1hpc.script.look import Look, digest_file, look_at
from r1hpc.script.loop import gets_checkpoint, look_of, promise, seen

if TYPE_CHECKING:
    from r1hpc.plan.hours.estimate import Estimate
    from r1hpc.plan.hours.goodput import FailureRates
    from r1hpc.plan.run import RunPlan


class Script(Workload):
    """One process of the script per rank."""

    def steps(self, config: RunConfig) -> int | None:
        return config.script.steps

    def shortened(self, config: RunConfig, num_steps: int) -> Sequence[str]:
        """Shorten it by {steps}; refuse a script of which is known that it reports no steps."""
        if not any("{steps}" in word for word in config.script.args):
            raise UsageError(
                "a drill shortens the script: hand its steps in by {steps}, as in -- --max_steps {steps}"
            )
        path = Path(str(config.script.path))
        if path.is_file() and path.suffix == ".py" and not look_at(path).library:
            raise UsageError(f"{path.name} {REPORTS_NO_STEPS}")
        return [f"script.steps={num_steps}"]

    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        """Refuse a script that would fail in the queue, or lose its work at the first preemption."""
        script = config.script
        if script.path is None:
            raise UsageError("stage script needs script.path: `python -m r1hpc.submit train.py -- ARGS`")
        _check_command(script)
        found = look_of(script)
        _check_resume(script, found)
        _check_names(script)
        if script.python and found.library:
            refuse_without("script.python", script.python, ["xxhash"])
        return Checked(config, [f"{Path(script.path).name}: {promise(script, found)}", *found.notes])

    def check(self, config: RunConfig, facts: Facts) -> list[str]:
        """Refuse several ranks for a script that saves on one of them alone."""
        ranks = config.resources.nodes * (facts.gpus_per_node or config.resources.ranks_per_node)
        found = look_of(config.script)
        if ranks > 1 and found.library == "accelerate" and found.saves_alone:
            raise UsageError(
                f"{found.saves_alone}: save_state is called on the main process alone, and all {ranks} ranks "
                "must save together: call it on every rank"
            )
        if ranks == 1 and found.joins_ranks and not config.script.distributed:
            return [
                f"{found.joins_ranks}: one rank gets no RANK and no MASTER_ADDR, as under plain python. If "
                "the script calls init_process_group with one rank too, set script.distributed=true"
            ]
        return []

    def estimate(
        self,
        config: RunConfig,
        plan: "RunPlan",
        rates: "FailureRates | None" = None,
        expected_model: Mapping[str, Any] | None = None,
        run_root: Path | None = None,
    ) -> "Estimate | None":
        """Return the hours of earlier runs of the same script; None if there are none."""
        from r1hpc.script.hours import estimate_like  # opens ledgers

        digest = look_of(config.script).digest
        return estimate_like(run_root, config, plan, digest) if run_root and digest else None

    def prepare(self, run: RunDir, config: RunConfig) -> str:
        """Record the script's digest; tell if it changed since the attempt before."""
        file, digest = digest_file(run), look_of(config.script).digest
        before = read_object(file).get("digest", digest)
        if before != digest:
            print(f"{config.script.path} has changed since the last attempt", file=sys.stderr, flush=True)
        write_json(file, {"digest": digest})
        note_earlier(run, config)
        return digest

    def run(self, job: RankJob) -> Outcome:
        from r1hpc.script.rank import run_script

        return run_script(job)

    def card(self, run: RunDir) -> list[tuple[str, str]]:
        from r1hpc.config.load import read
        from r1hpc.script.rank import command_of
        from r1hpc.telemetry.records.attempts import read_history

        config, last = read(run.config), read_history(run).last
        loop = seen(run, config, last.attempt) if last else ""
        command = shlex.join(command_of(run, config, newest_checkpoint(run, config)))
        return [("command", command), *([("loop", loop)] if loop else [])]


def _check_command(script: ScriptConfig) -> None:
    path = Path(str(script.path))
    if not script.python and path.is_file() and path.suffix != ".py" and not os.access(path, os.X_OK):
        raise UsageError(f"{path} is not executable: chmod +x it, or give script.python")
    for word in (script.path, *shlex.split(script.python or "")):
        if word and (word in MODULES or Path(word).name in (*LAUNCHERS, "mpirun", "srun")):
            raise UsageError(
                f"{word} starts processes of its own, and r1hpc starts one per rank: give the script itself, "
                "with --nodes and --gpus-per-node, or the whole command, `submit torchrun … train.py`"
            )
    if script.steps is None and any("{steps}" in word for word in script.args):
        raise UsageError("script.args uses {steps}: set script.steps")
    if script.cwd and not Path(script.cwd).is_dir():
        raise UsageError(f"script.cwd={script.cwd} is no folder")


def _check_names(script: ScriptConfig) -> None:
    """Refuse {chekpoint}, and a sweep's {wd} without values. A template such as ckpt-{epoch}.pt passes."""
    from r1hpc.script.rank import FILLED

    for word in (*script.args, *script.resume_args):
        for name in re.findall(r"(?<!\$)\{([A-Za-z_]\w*)\}", word):
            is_whole = word.rpartition("=")[2] == f"{{{name}}}"
            near = nearest(name, FILLED)
            if name not in FILLED and (is_whole or near):
                known = ", ".join(f"{{{each}}}" for each in FILLED)
                raise UsageError(
                    f"script.args: nothing fills {{{name}}}{near}. Known are {known}, and in a sweep the "
                    f"names it varies, {name}=A,B"
                )


def _check_resume(script: ScriptConfig, found: Look) -> None:
    """Refuse a script whose checkpoints nobody knows."""
    gets_it = gets_checkpoint(script)
    if not found.library and gets_it and not script.checkpoints:
        raise UsageError(
            f"nothing tells how {Path(str(script.path)).name} goes on after a preemption: {{checkpoint}} and "
            "script.resume_args need the pattern of its checkpoints, script.checkpoints='out/checkpoint-*'"
        )
    if found.library in ("", "accelerate") and script.checkpoints is None and not gets_it:
        raise UsageError(
            f"nothing tells how {Path(str(script.path)).name} goes on after a preemption: name its "
            "checkpoints, script.checkpoints='out/checkpoint-*', and hand the newest in, -- --resume "
            "{checkpoint}, unless it finds it by itself; or use r1hpc.client in it; or give "
            "\"script.checkpoints=''\" if it may begin anew"
        )


SCRIPT = Script()
