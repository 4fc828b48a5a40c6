"""Cancel a run, a chain or a sweep.

    python -m r1hpc.cancel RUN_DIR               # its job gets SIGTERM; it is not requeued
    python -m r1hpc.cancel RUN_DIR --save-first  # touch STOP: it saves after its next step, then ends
    python -m r1hpc.cancel CHAIN_OR_SWEEP        # every stage or point that waits or runs

Without a name it cancels nothing. A job is cancelled by the ID in the run folder, and only if it is yours and
this run's.
"""

from collections.abc import Sequence
from typing import Any

from r1hpc.base.choose_run import RUN_NAMES
from r1hpc.base.cli import ArgumentParser, add_json, add_run_root, offer, print_result, run_command
from r1hpc.base.errors import UsageError


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.cancel", description=__doc__)
    run = parser.add_argument(
        "run_dir", nargs="?", metavar="RUN_DIR", help="a run or a chain: its folder or its name"
    )
    offer(run, RUN_NAMES)
    add_run_root(parser)
    parser.add_argument("--save-first", action="store_true", help="let it save and end by itself")
    add_json(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.api import Chain, open_run_or_chain

    shown: dict[str, Any]
    if arguments.run_dir is None:
        raise UsageError("cancel needs the name of a run: python -m r1hpc.status --all lists them")
    from r1hpc.sweeps.definition import SweepDir

    if sweep := SweepDir.find(arguments.run_dir, arguments.run_root):
        from r1hpc.sweeps.plan import cancel_sweep

        points = cancel_sweep(sweep, arguments.save_first)
        shown = {"sweep": sweep.name, "sweep_dir": str(sweep.path), "points": points}
        text = "\n".join(points.values()) or f"{sweep.name}: no point waits or runs"
    elif isinstance(chosen := open_run_or_chain(arguments.run_dir, arguments.run_root), Chain):
        cancelled = chosen.cancel(save_first=arguments.save_first)
        stages = [
            {"stage": name, "run_dir": str(chosen[name].path), "action": each.action, "said": each.text}
            for name, each in cancelled.items()
        ]
        shown = {"chain": chosen.name, "chain_dir": str(chosen.path), "stages": stages}
        text = "\n".join(each.text for each in cancelled.values())
        text = text or f"{chosen.name}: no stage waits or runs"
    else:
        done = chosen.cancel(save_first=arguments.save_first)
        shown = {"run_id": chosen.run_id, "run_dir": str(chosen.path), "job_id": done.job_id}
        shown |= {"action": done.action, "said": done.text}
        text = done.text
    print_result(shown, text, arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
