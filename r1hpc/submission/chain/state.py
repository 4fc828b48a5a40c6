"""Tell the state of a chain from the states of its stages, and cancel a chain."""

from collections.abc import Iterable
from dataclasses import dataclass

from r1hpc.attempt.state.cancel import Cancellation, cancel_job, touch_stop
from r1hpc.attempt.state.state import Situation, State, read_situation
from r1hpc.base.run_dir import RunDir
from r1hpc.checkpoint.finished import OLD, why_old
from r1hpc.submission.chain.file import Stage, open_definition
from r1hpc.submission.chain.folder import ChainDir

WAITING = "waiting"
"""State of a stage that has not begun because one that it needs is not finished."""


@dataclass(frozen=True)
class StageSituation:
    stage: Stage
    run: RunDir
    situation: Situation | None
    """None: it was never submitted."""
    unfinished_needs: tuple[str, ...]
    why_old: str = ""
    """Its input has changed since it finished."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def has_begun(self) -> bool:
        return self.situation is not None and bool(self.situation.history.attempts)

    @property
    def is_at_work(self) -> bool:
        return self.situation is not None and self.situation.state.is_at_work

    @property
    def state(self) -> str:
        """Return a run's state, or `waiting`."""
        if self.situation is not None and (self.has_begun or self.situation.state is State.finished):
            return self.situation.state.value
        if self.unfinished_needs:
            return WAITING
        return State.unknown.value if self.situation is None else self.situation.state.value

    @property
    def detail(self) -> str:
        if self.state == WAITING:
            again = "" if self.is_at_work else "; submit the chain again"
            return f"for {', '.join(self.unfinished_needs)}{again}"
        return self.why_old or (self.situation.detail if self.situation is not None else "never submitted")


@dataclass(frozen=True)
class ChainSituation:
    chain: ChainDir
    stages: tuple[StageSituation, ...]

    @property
    def state(self) -> State:
        """Return finished if all are, running or queued if any is, else the end of the first unfinished."""
        states = [stage.situation.state for stage in self.stages if stage.situation is not None]
        if all(stage.state == State.finished for stage in self.stages):
            return State.finished
        for alive in (State.running, State.requeued, State.queued):
            if alive in states:
                return alive
        return next((s for s in states if s is not State.finished), State.unknown)

    @property
    def num_finished(self) -> int:
        return sum(stage.state == State.finished for stage in self.stages)

    @property
    def detail(self) -> str:
        ended = [f"{s.name} {s.state}" for s in self.stages if s.has_begun and not s.is_at_work]
        bad = [each for each in ended if not each.endswith(State.finished.value)]
        old = [f"{s.name} old" for s in self.stages if s.why_old]
        return ", ".join([f"{self.num_finished} of {len(self.stages)} stages finished", *bad, *old])

    @property
    def current(self) -> StageSituation:
        """Return the stage that stands for the chain: the first running one, else the last that ran."""
        at_work = [s for s in self.stages if s.is_at_work and s.has_begun]
        begun = [s for s in self.stages if s.has_begun]
        return (at_work or begun[-1:] or list(self.stages))[0]


def read_chain_situation(chain: ChainDir) -> ChainSituation:
    """Return the situation of a chain; each open stage may cost a call to Slurm."""
    stages = open_definition(chain).stages
    finished = {stage.name for stage in stages if chain.stage(stage.name).finished.exists()}
    found, old = [], old_stages(chain, stages)
    for stage in stages:
        run = chain.stage(stage.name)
        known = run.config.is_file() or run.attempts.is_file()
        unfinished = tuple(name for name in stage.needs if name not in finished)
        situation = read_situation(run) if known else None
        found.append(StageSituation(stage, run, situation, unfinished, old.get(stage.name, "")))
    return ChainSituation(chain, tuple(found))


def old_stages(chain: ChainDir, stages: Iterable[Stage]) -> dict[str, str]:
    """Return why each finished stage is old whose input has changed since, or is old itself."""
    found: dict[str, str] = {}
    for stage in stages:
        run = chain.stage(stage.name)
        why = why_old(run, found) if run.finished.exists() else ""
        if why.startswith(OLD):
            found[stage.name] = why
    return found


def cancel_chain(chain: ChainDir, save_first: bool = False) -> dict[str, Cancellation]:
    """Cancel a chain, the last stage first: none may begin because the one before it has just ended.

    Raise the errors of `cancel_job`.
    """
    done = {}
    for stage in reversed(read_chain_situation(chain).stages):
        situation = stage.situation
        if situation is None or not situation.state.is_at_work:
            continue
        # The supervisor of a chain is one process for all waiting stages: STOP affects only this stage.
        job = situation.job
        is_queued_here = situation.state is State.queued and job is not None and job.pid is not None
        end = touch_stop if save_first or is_queued_here else cancel_job
        done[stage.name] = end(stage.run, situation)
    return done
