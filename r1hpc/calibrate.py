"""Compare the estimates of finished runs with their real cost, and show the correction for the next one.

    python -m r1hpc.calibrate                    # all finished runs under ./runs or $R1HPC_RUN_ROOT
    python -m r1hpc.calibrate --run-root DIR --json

Each run is compared with its estimate, plain and corrected by earlier runs of the same stage and about the
same size. `estimate` and `submit` apply the correction themselves; the next estimate shown is for a run like
the last one. Hours are GPU-hours, for CPU runs node-hours.
"""

from collections.abc import Sequence

from r1hpc.base.choose_run import existing_run_root
from r1hpc.base.cli import ArgumentParser, add_json, add_run_root, print_result, run_command


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.calibrate", description=__doc__)
    add_json(parser)
    add_run_root(parser)
    arguments = parser.parse_args(argv)
    # Deferred to keep --help quick.
    from r1hpc.accounting.calibrate import finished_runs, site_json, site_text

    site = finished_runs(existing_run_root(arguments.run_root))
    print_result(site_json(site), site_text(site), arguments.json)
    return 0


if __name__ == "__main__":
    run_command(main)
