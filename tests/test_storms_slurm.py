"""Runs on a real Slurm meet sixteen random acts of violence, and end as their undisturbed twins, to the bit.

    pytest tests/test_storms_slurm.py -m soak -s -k grpo-3     # one storm takes five to ten minutes
    python -m tests.cluster box pytest …                       # another one at the same time

A storm is drawn from its kind of run and its seed. It prints its acts with their times, and what became of
each attempt: its cause must be one that sacct or an act explains.
"""

import json
import math
import random
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest

from r1hpc.attempt.state.state import newest_job, read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.slurm.sacct import JobRecord, sacct_records
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.telemetry.records.attempts import Attempt, Cause
from r1hpc.telemetry.records.metrics import compare, last_steps
from tests.cluster import Cluster, ClusterError
from tests.runs import CHECKOUT, assert_same_run, read_text, submit, wait_over, wait_until
from tests.script.hits import SCRIPTS, words_of
from tests.submission.chains import COMMON, submitted
from tests.train.test_rl_disturbed import assert_same_learning

_SEEDS, _NUM_ACTS, _LEAST_ACTS = range(10), 16, 15
_SLACK_S = 15
"""An attempt may be longer than its job was by sacct: suspended, or saving after its requeue."""
_AGAIN, _AGAIN_S = "signal again", (55, 85)
"""slurmctld repeats a signal that a node lost as it went down after 60 s (RPC_RETRY_INTERVAL). The attempt
that runs by then gets it, for its step has the same number."""
_CLOCKS = ("", "+40s", "-300s", "-40s", "+300s")
"""By seed, what is wrong with the clock that a run's job reads."""
Runs = list[RunDir]
Twins = tuple[Path, dict[str, Runs]]

# Explanations for the end of an attempt: an act in its time, or the state of its job in sacct.
_BY_STATE = {"PREEMPTED": {Cause.preempted}, "NODE_FAIL": {Cause.node_fail}}
_BY_ACT: dict[str, set[Cause]] = {
    "preempt": {Cause.preempted},
    "requeue": {Cause.preempted},
    "usr2": {Cause.preempted},
    "cancel step": {Cause.crash},  # scancel kills a step at once
    "kill rank": {Cause.crash},
    "kill srun": {Cause.crash},
    "node down": {Cause.node_fail},
    "kill begin": {Cause.unknown},  # after it had put the attempt on record
    "kill end": set(),
    "suspend": set(),
    "term shell": set(),
    "kill slurmctld": set(),
}
_COMMANDS = {
    "requeue": "scontrol requeue {job}",
    "usr2": "scancel --signal=USR2 {job}",
    "cancel step": "scancel {job}.0",
    "term shell": "scancel --batch --signal=TERM {job}",
}
_VICTIMS = {
    "kill rank": "r1hpc.slurm.payload\0{run}/submitit\0",
    "kill srun": "--output={run}/logs/attempt_",
    "kill begin": "r1hpc.launch\0begin\0{run}\0",
    "kill end": "r1hpc.launch\0end\0{run}\0",
}

_CHAIN = (
    COMMON
    + """\
  - name: one
    train: {num_steps: 4}
  - name: two
    train: {num_steps: 32}
    model: {path: "${stage:one}/model"}
"""
)
_SIZE = ("train.num_steps=48", "checkpoint.save_every=3", "train.global_batch_size=4")
_GRPO = ("resources.ranks_per_node=1", "rl.num_iterations=2", "train.num_steps=36")
_KINDS = {
    "rank": ("smoke", ("--nodes", "1", *_SIZE)),
    "node": ("smoke", ("--nodes", "1", "resources.ranks_per_node=2", *_SIZE)),
    "nodes": ("smoke", ("--nodes", "2", *_SIZE)),
    "grpo": ("rl_smoke", ("--nodes", "2", *_GRPO)),
    "chain": ("", ("checkpoint.save_every=3",)),
    "trainer": ("", ("--nodes", "2", "resources.gpus_per_node=0")),
}
_TRAINER = f"""
stage: script
script: {{path: {SCRIPTS / "hf_trainer.py"}, args: [--out, "{{run}}/out", --every, "3"]}}
"""
_LIMITS = [f"limits.max_{what}=-1" for what in ("crashes", "node_failures", "ooms", "hangs")]
_PATIENT = (*_LIMITS, "limits.max_attempts_without_checkpoint=1000")


@dataclass(frozen=True)
class Act:
    """One act of a storm. `fraction` and `choice` decide how long is waited, and who is met."""

    name: str
    moment: str
    fraction: float
    choice: int


@dataclass(frozen=True)
class Done:
    """An act that was done, from `began` to `ended`, in Unix seconds."""

    name: str
    began: float
    ended: float = math.inf
    detail: str = "under way"


def draw(kind: str, seed: int) -> list[Act]:
    """Return the acts of a storm: every one at least once."""
    chance = random.Random(f"{kind}-{seed}")
    ending = [name for name, causes in _BY_ACT.items() if causes]
    names = [*_BY_ACT, *chance.choices(ending, k=_NUM_ACTS - len(_BY_ACT))]
    chance.shuffle(names)
    moments = chance.choices(("at once", "in start-up", "between steps"), (2, 3, 5), k=len(names))
    return [Act(*each, chance.random(), chance.randrange(8)) for each in zip(names, moments, strict=True)]


def allowed(state: str | None, acts: Collection[str]) -> set[Cause]:
    """Return the causes that an attempt may have by its job's state in sacct and the acts in its time."""
    by_act = {**_BY_ACT, _AGAIN: {Cause.preempted, Cause.crash}}  # SIGTERM, and SIGKILL after KillWait
    return _BY_STATE.get(state or "", set()).union(*(by_act[act] for act in acts))


def explain(
    attempts: Sequence[Attempt],
    records: Sequence[JobRecord],
    done: Sequence[Done],
    cancelled: Mapping[int, Collection[float]],
) -> list[tuple[str, bool]]:
    """Return a line for each attempt, and True if its cause is explained.

    Args:
        cancelled: when slurmstepd cancelled the step of an attempt and gave no reason.
    """
    lines = []
    for attempt in attempts:
        start = attempt.job_start or 0.0
        record = next((record for record in reversed(records) if record.start == start), None)
        state = record.state if record else None
        over = min((r.start for r in records if r.start is not None and r.start > start), default=math.inf)
        lag_s = {d: 30 if d.name == "preempt" else 1 for d in done}  # a preemptor waits for its turn
        acts = [d.name for d in done if d.began < over and d.ended + lag_s[d] >= start]
        again = [(d.began + _AGAIN_S[0], d.ended + _AGAIN_S[1]) for d in done if d.name == "node down"]
        if any(low < at < high for at in cancelled.get(attempt.attempt, ()) for low, high in again):
            acts.append(_AGAIN)
        is_true = attempt.cause in allowed(state, acts)
        if attempt.cause is Cause.finished:
            is_true = attempt is attempts[-1] and state in ("COMPLETED", "PREEMPTED", "REQUEUED")
        lasted = math.inf if attempt.end is None else attempt.end - attempt.start
        is_true &= record is not None and 0 <= lasted < record.elapsed_s + _SLACK_S
        line = f"attempt {attempt.attempt}: {attempt.cause} ({attempt.detail}), steps {attempt.resumed_from} "
        line += (
            f"to {attempt.last_step}, {lasted:.0f} s; job from {_clock(start)}, {state}; {', '.join(acts)}"
        )
        lines.append((line if is_true else f"{line}  <-- NOT EXPLAINED", is_true))
    return lines


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) if seconds < math.inf else "?"


class Storm:
    """Acts that are done to whichever of the runs is at work."""

    def __init__(self, cluster: Cluster, runs: Sequence[RunDir]) -> None:
        self.cluster, self.runs = cluster, runs
        self.done: list[Done] = []

    @property
    def run(self) -> RunDir:
        return next((run for run in self.runs if not run.finished.exists()), self.runs[-1])

    @property
    def is_over(self) -> bool:
        return all(run.finished.exists() for run in self.runs)

    def until(self, what: str, reached: Callable[[], bool]) -> None:
        """Wait until then, or until the runs are over."""
        # A step that begins may lose Slurm's signal: then its rank waits for the dead one until its watchdog.
        wait_until(what, lambda: self.is_over or reached(), 700, self.run)

    def until_running(self) -> None:
        self.until("a running job", lambda: self.cluster.state(job_of(self.run)) == "RUNNING")

    def wait_moment(self, act: Act) -> None:
        """Wait so that the act meets the run at the moment that was drawn."""
        run, more = self.run, 1 + int(4 * act.fraction)
        before = [(step.attempt, step.global_step + more) for step in last_steps(run, 1)]

        def has_stepped() -> bool:
            now = [(step.attempt, step.global_step) for step in last_steps(run, 1)]
            return run.finished.exists() or (bool(now) and now >= before)

        if act.moment == "at once":
            time.sleep(2 * act.fraction)
        elif act.moment == "in start-up":
            self.until_running()
            time.sleep(8 * act.fraction)
        else:
            self.until("steps", has_stepped)

    def do(self, act: Act) -> None:
        """Do the act, once there is somebody to do it to."""
        if act.name in ("kill begin", "kill end") and not self.victims(act.name):
            self.do(replace(act, name=("usr2", "kill rank")[act.choice % 2]))
        if act.name in ("kill begin", "kill end"):
            with suppress(AssertionError):  # an act before it has taken the whole job
                wait_until(act.name, lambda: bool(self.victims(act.name)), 60)
            time.sleep(act.fraction)
        elif act.name in ("usr2", "cancel step", "kill rank", "kill srun"):
            self.until("a step", lambda: bool(self.victims("kill rank") and self.victims("kill srun")))
        elif act.name == "term shell":
            self.until_running()
            self.until("a shell that has set its traps", self.shell_listens)
        elif act.name != "kill slurmctld":
            self.until_running()
        if self.is_over:
            return
        began = time.time()
        self.done.append(Done(act.name, began))
        said = self.hit(act)
        self.done[-1:] = [Done(act.name, began, time.time(), said)] if said else []  # nobody was left
        print(f"{_clock(began)} {act.name}: {said or 'nobody was left'}", flush=True)

    def hit(self, act: Act) -> str:
        job, cluster = job_of(self.run), self.cluster
        if act.name in _COMMANDS:
            return self.ask(_COMMANDS[act.name].format(job=job))
        if act.name in _VICTIMS:
            pids = self.victims(act.name)
            return self.ask(f"kill -KILL {pids[act.choice % len(pids)]}") if pids else ""
        if act.name == "suspend":
            said = self.ask(f"scontrol suspend {job}")
            time.sleep(1 + 5 * act.fraction)
            return f"{said}, {self.ask(f'scontrol resume {job}')}"
        if act.name == "kill slurmctld":
            with suppress(ClusterError):  # it holds a job that runs and that it does not know of any more
                cluster.wait_saved([job])
            cluster.kill_controller()
            time.sleep(8 * act.fraction)
            cluster.start_controller()
            return "started again"
        try:
            if act.name == "preempt":
                return f"by job {cluster.preempt(job)}"
            nodes = cluster.node_list(job)
            node = nodes[act.choice % len(nodes)]
        except ClusterError:  # it has just left its nodes
            return ""
        cluster.fail_node(node, declare=True)
        time.sleep(5 * act.fraction)
        cluster.restore_node(node, idle=False)
        return node

    def ask(self, command: str) -> str:
        done = self.cluster.run(command.split(), check=False)
        return " ".join((done.stdout + done.stderr).split()) or "done"

    def victims(self, name: str) -> list[int]:
        """Return the processes of the run that this act may kill, without their forks."""
        words, parents = _VICTIMS[name].format(run=self.run.path), {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            text = read_text(path)
            if words in text and text.startswith("srun\0") is (name == "kill srun"):
                status = read_text(path.parent / "stat").rpartition(")")[2].split()
                parents[int(path.parent.name)] = int(status[1]) if status else 0
        return sorted(pid for pid, parent in parents.items() if parent not in parents)

    def shell_listens(self) -> bool:
        """Return True once the job's shell has opened its log, which it does after it has set its traps.

        A SIGTERM before that kills it, and Slurm then records the job as failed.
        """
        log = self.run.logs / f"slurm-{job_of(self.run)}.out"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if "/slurm_script" in read_text(path) and (path.parent / "fd" / "1").readlink() == log:
                    return True
        return False

    def judge(self) -> tuple[str, bool]:
        """Return what was done and what became of it, and True if each cause is explained."""
        lines = [(f"{_clock(d.began)} to {_clock(d.ended)} {d.name}: {d.detail}", True) for d in self.done]
        for run in self.runs:
            records = sacct_records(str(job_of(run)))
            attempts = read_situation(run).history.attempts
            lines += explain(attempts, records, self.done, {a.attempt: cancels(run, a) for a in attempts})
        return "\n".join(line for line, _ in lines), all(is_true for _, is_true in lines)


def cancels(run: RunDir, attempt: Attempt) -> list[float]:
    """Return when slurmstepd cancelled the attempt's step and gave no reason, in Unix seconds."""
    texts = [read_text(path) for path in run.attempt_logs(attempt.attempt).glob("rank_*.out")]
    times = [at for text in texts for at in re.findall(r"STEP \S+ ON \S+ CANCELLED AT (\S+) \*\*\*", text)]
    return [datetime.fromisoformat(at).timestamp() for at in times]


def job_of(run: RunDir) -> int:
    newest = newest_job(run)
    assert newest is not None
    return int(newest.job_id)


def start(root: Path, name: str, kind: str, cluster: Cluster, clock: str = "", slow: str = "") -> Runs:
    """Submit a run, a chain, or somebody's script; return its runs."""
    job, sizes = _KINDS[kind]
    text = (CHECKOUT / "jobs" / f"{job}.yaml").read_text() if job else _CHAIN
    moment = "step.begin"
    if kind == "trainer":
        text, moment = _TRAINER, "step.end"
    if clock:
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
        line = f"export LD_PRELOAD={library} FAKETIME={clock} FAKETIME_DONT_FAKE_MONOTONIC=1"
        text = f"cluster: {{setup: {json.dumps([line])}}}\n{text}"
    (root / name).mkdir()
    path = root / name / "small.yaml"
    path.write_text(text)
    words = (*sizes, *_PATIENT, "--executor", "slurm", "--qos", "scavenger", "-t", "60")
    env = cluster.env(**({"R1HPC_FAILPOINT": f"{moment}:sleep={slow}::*"} if slow else {}))
    if kind != "chain":
        return [submit(root / "runs", name, *words, job=str(path), env=env).run]
    submitted(root / name, str(path), *words, env=env)
    return [ChainDir(root / name / "runs" / "small").stage(stage) for stage in ("one", "two")]


def assert_same_words(run: RunDir, twin: RunDir) -> None:
    """Every number that the script logged, and its weights, are those of its twin."""
    assert compare(twin, run) == []
    words = words_of(read_text(run.rank_log(read_situation(run).history.attempts[-1].attempt, 0)))
    assert len(words) > 20
    assert words == words_of(read_text(twin.rank_log(1, 0)))


_ASSERT_SAME = {"grpo": assert_same_learning, "trainer": assert_same_words}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Return one folder for all, so that the dataset is built once, and the runs that nobody touched."""
    return tmp_path_factory.mktemp("storms"), {}


@pytest.mark.slurm
@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", _SEEDS)
@pytest.mark.parametrize("kind", _KINDS)
def test_a_storm_changes_nothing(
    kind: str, seed: int, twins: Twins, prompt_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in prompt_cluster.env().items():
        monkeypatch.setenv(key, value)  # read_situation() and sacct_records() ask this cluster
    root, quiet = twins
    if kind not in quiet:
        quiet[kind] = start(root, f"{kind}-quiet", kind, prompt_cluster)
        assert [wait_over(run)[-1].cause for run in quiet[kind]] == [Cause.finished] * len(quiet[kind])
    clock, began = _CLOCKS[seed % len(_CLOCKS)], time.monotonic()
    storm = Storm(prompt_cluster, start(root, f"{kind}-{seed}", kind, prompt_cluster, clock, "0.6"))
    try:
        for act in draw(kind, seed):
            storm.wait_moment(act)
            storm.do(act)
        for run, twin in zip(storm.runs, quiet[kind], strict=True):
            assert wait_over(run, 600)[-1].cause is Cause.finished
            prompt_cluster.wait_job(job_of(run), {"COMPLETED"}, 120)
            _ASSERT_SAME.get(kind, assert_same_run)(run, twin)
        assert storm.judge()[1], "a cause is not explained, see below"
        assert len(storm.done) >= _LEAST_ACTS, "the run was over too soon: let it take more steps"
    finally:
        print(
            f"\n{kind}-{seed}, clock {clock or 'right'}, {time.monotonic() - began:.0f} s\n{storm.judge()[0]}"
        )


# -- the draw, and the table of causes ------------------------------------------------------------------


def test_a_storm_is_drawn_from_its_seed_and_has_every_act() -> None:
    storms = [draw(kind, seed) for kind in _KINDS for seed in _SEEDS]
    assert storms == [draw(kind, seed) for kind in _KINDS for seed in _SEEDS]
    assert all(len(acts) >= _LEAST_ACTS and {act.name for act in acts} == {*_BY_ACT} for acts in storms)
    assert len({tuple(act.name for act in acts) for acts in storms}) == len(storms)
    assert {_CLOCKS[seed % len(_CLOCKS)] for seed in _SEEDS} == {*_CLOCKS}


@pytest.mark.parametrize(
    ("state", "acts", "causes"),
    [
        ("REQUEUED", [], set()),
        (None, ["suspend", "term shell", "kill slurmctld"], set()),
        ("REQUEUED", ["usr2", "kill rank", "kill end"], {Cause.preempted, Cause.crash}),
        ("NODE_FAIL", ["node down", "suspend"], {Cause.node_fail}),
        ("PREEMPTED", ["kill begin"], {Cause.preempted, Cause.unknown}),
    ],
)
def test_a_cause_needs_a_state_or_an_act(state: str | None, acts: list[str], causes: set[Cause]) -> None:
    assert allowed(state, acts) == causes


def test_an_act_counts_in_the_time_of_its_job_only() -> None:
    causes = (Cause.crash, Cause.node_fail, Cause.finished)
    states = {100: "REQUEUED", 200: "NODE_FAIL", 300: "COMPLETED"}
    records = [JobRecord("7", s, t, t + 9, 9, 0, 1, "n", "0:0", 0, *"uapqn") for t, s in states.items()]
    done = [Done("kill rank", 130, 131), Done("node down", 230, 240)]

    def are_true(*causes: Cause, longer_s: int = 0) -> list[bool]:
        starts = [(cause, t, t + 9 + longer_s) for cause, t in zip(causes, states, strict=True)]
        attempts = [Attempt(1, c, t, end, 1, 0, 1, 9, 9, job_id="7", job_start=t) for c, t, end in starts]
        return [is_true for _, is_true in explain(attempts, records, done, {})]

    assert are_true(*causes) == [True, True, True]
    assert are_true(*causes, longer_s=20) == [False, False, False]
    assert are_true(*reversed(causes)) == [False, True, False]


def test_a_signal_that_a_node_lost_comes_to_a_later_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    line = "slurmstepd-r1n1: error: *** STEP 2.0 ON r1n1 CANCELLED AT {}{} ***\n"
    run.attempt_logs(1).mkdir(parents=True)
    said = line.format("2026-11-30T20:00:32", "") + line.format("2026-11-30T20:01:00", " DUE TO JOB REQUEUE")
    (run.attempt_logs(1) / "rank_0.out").write_text(said)
    at = datetime.fromisoformat("2026-11-30T20:00:32").timestamp()
    records = [JobRecord("7", "REQUEUED", at - 9, at + 9, 18, 0, 1, "n", "0:0", 0, *"uapqn")]

    def is_true(cause: Cause, down: float) -> bool:
        attempt = Attempt(1, cause, at - 9, at + 9, 1, 0, 1, 9, 9, job_id="7", job_start=at - 9)
        acts = [Done("node down", down, down + 1)]
        return explain([attempt], records, acts, {1: cancels(run, attempt)})[0][1]

    assert is_true(Cause.preempted, at - 62)
    assert is_true(Cause.crash, at - 62)
    assert not is_true(Cause.oom, at - 62)
    assert not is_true(Cause.crash, at - 90)
    assert not is_true(Cause.crash, at - 40)
