"""Submit an order: a run or a chain of runs.

done = submit(Order(job="jobs/r1.yaml"))       # a SubmittedRun or a SubmittedChain
"""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from r1hpc.base.names import check_name
from r1hpc.config.load import find_job
from r1hpc.submission.chain.file import is_chain_file
from r1hpc.submission.chain.folder import ChainDir, find_chain
from r1hpc.submission.order import Order
from r1hpc.submission.submit_run import budget_held

if TYPE_CHECKING:
    from r1hpc.submission.submit_chain import SubmittedChain
    from r1hpc.submission.submit_run import SubmittedRun


def submit(order: Order) -> "SubmittedRun | SubmittedChain":
    """Begin a run or a chain, or continue an existing chain.

    Raises:
        UsageError: it cannot run as ordered.
        R1hpcError: the budget is too small, or Slurm refuses or does not answer.
    """
    with nullcontext() if order.is_dry_run else budget_held(order.counted_root):
        return _submit(order)


def _submit(order: Order) -> "SubmittedRun | SubmittedChain":
    chain = _chain(order)
    if chain is None:
        from r1hpc.submission.submit_run import submit_run

        return submit_run(order)
    from r1hpc.submission.submit_chain import submit_chain

    return submit_chain(chain, find_job(order.job) if order.job is not None else None, order)


def _chain(order: Order) -> ChainDir | None:
    """Return the ordered chain, by its file or its name; None if it is a run."""
    if order.job is not None and is_chain_file(find_job(order.job)):
        name = check_name(order.run_name or find_job(order.job).stem, "--run-name")
    elif order.job is None and order.run_name:
        name = order.run_name
    else:
        return None
    chain = ChainDir(order.folder(name).path)
    return find_chain(chain.path) or (chain if order.job is not None else None)
