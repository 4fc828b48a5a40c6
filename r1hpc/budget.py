"""Show the GPU-hours left, the hours promised to running and queued jobs, and the campaign's progress.

    python -m r1hpc.budget                       # configs/budget.yaml, or RUN_ROOT/budget.yaml
    python -m r1hpc.budget --budget FILE --json
    python -m r1hpc.budget --campaign hundred_days

If the budget names an account, spent hours come from Slurm, else from the run folders. Every forecast is P50
(P10 to P90). The exit status is 1 if more than the budget, or a user's quota, is spent.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from r1hpc.base.cli import ArgumentParser, add_json, add_run_root, offer, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import run_root_of


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.budget", description=__doc__)
    parser.add_argument(
        "--budget", type=Path, metavar="FILE", help="default $R1HPC_BUDGET, RUN_ROOT/budget.yaml, configs/"
    )
    campaign = parser.add_argument(
        "--campaign", metavar="NAME", help="a plan of stages; default the budget's"
    )
    offer(campaign, "r1hpc.config.assets:campaigns")
    what = "how many shards, or MPS parts, make one GPU; default gres_per_gpu of the budget"
    parser.add_argument("--gres-per-gpu", metavar="shard=N,mps=N", help=what)
    add_json(parser)
    add_run_root(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.accounting.budget import find_budget, load_budget
    from r1hpc.accounting.budget_status import read_budget_status
    from r1hpc.accounting.campaign import follow_campaign
    from r1hpc.accounting.open_ledger import survey
    from r1hpc.reporting.budget_text import budget_json, budget_text
    from r1hpc.slurm.gres import parse_shares

    root = run_root_of(arguments.run_root)
    now = time.time()
    path = find_budget(root, arguments.budget)
    budget = load_budget(path)
    if arguments.gres_per_gpu:
        if budget is None or budget.account is None:
            raise UsageError(f"--gres-per-gpu needs an account's budget: set gpu_hours and account in {path}")
        budget = replace(budget, gres_per_gpu=parse_shares(arguments.gres_per_gpu, "--gres-per-gpu"))
    runs, notes = survey(root, now)
    if not root.is_dir():
        notes.append(
            f"there is no folder {root.absolute()}, so no run is counted: --run-root, R1HPC_RUN_ROOT"
        )
    status = read_budget_status(budget, runs, now)
    progress = follow_campaign(budget, runs, now, arguments.campaign)
    text = "\n\n".join(budget_text(path, budget, status, progress, notes, now))
    print_result(budget_json(path, budget, status, progress, notes), text, arguments.json)
    return int(budget is not None and status.is_over(budget))


if __name__ == "__main__":
    run_command(main)
