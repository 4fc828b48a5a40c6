"""How good were the estimates, and what does this site make of the next one?

    python -m r1hpc.calibrate                    # all finished runs under ./runs or $R1HPC_RUN_ROOT
    python -m r1hpc.calibrate --run-root DIR --json

Each finished run is set beside its estimate and beside that estimate corrected by the runs before it
that are like it: of the same stage and of about the same size. `estimate` and `submit` correct by
themselves; what is shown as the next estimate is that of a run like the last one. Hours are GPU-hours,
for CPU runs node-hours.
"""

from collections.abc import Sequence

from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.find_run import add_run_root, existing_run_root


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.calibrate", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_run_root(parser)
    arguments = parser.parse_args(argv)
    # Deferred: --help must be quick.
    from r1hpc.accounting.calibrate import finished_runs, site_json, site_text

    site = finished_runs(existing_run_root(arguments.run_root))
    if arguments.json:
        print_json(site_json(site))
    else:
        print(site_text(site))
    return 0


if __name__ == "__main__":
    run_command(main)
