"""End a chain: every stage that waits or runs, the last first.

done = cancel_chain(chain)      # {"grpo": Cancellation(…), "sft": …}
"""

from r1hpc.attempt.cancel import Cancellation, cancel_job, touch_stop
from r1hpc.attempt.state import Situation, State
from r1hpc.submission.chain_folder import ChainDir
from r1hpc.submission.chain_state import StageSituation, read_chain_situation


def cancel_chain(chain: ChainDir, save_first: bool = False) -> dict[str, Cancellation]:
    """The last stage first: none may begin because the one before it has just ended.

    Raises:
        StateError: a stage's job is not its own, or not yours, or on another host.
        SlurmError: Slurm did not answer.
    """
    open_stages = [stage for stage in read_chain_situation(chain).stages if stage.is_at_work]
    return {stage.name: _cancel_stage(stage, save_first) for stage in reversed(open_stages)}


def _cancel_stage(stage: StageSituation, save_first: bool) -> Cancellation:
    situation = stage.situation
    assert situation is not None, "it is at work"
    # The supervisor of a chain has one process for all stages that wait: STOP is for this one alone.
    if save_first or _is_queued_here(situation):
        return touch_stop(stage.run, situation)
    return cancel_job(stage.run, situation)


def _is_queued_here(situation: Situation) -> bool:
    job = situation.job
    return situation.state is State.queued and job is not None and job.pid is not None
