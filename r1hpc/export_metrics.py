"""Export a run's metrics to TensorBoard, Prometheus or W&B.

    python -m r1hpc.export_metrics RUN --to tensorboard            # event files in RUN/report/tensorboard/
    python -m r1hpc.export_metrics RUN --to tensorboard --follow   # and new steps, until the run is over
    python -m r1hpc.export_metrics RUN --to prometheus            # RUN/metrics/r1hpc.prom
    python -m r1hpc.export_metrics RUN --to prometheus --out /var/lib/node_exporter/textfile --follow
    python -m r1hpc.export_metrics RUN --to wandb --project NAME   # offline: WANDB_MODE=offline

TensorBoard and W&B are extras: pip install 'r1hpc[tensorboard]', 'r1hpc[wandb]'. For Prometheus --out is the
folder of node_exporter's textfile collector; everyone can read the file.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import add_run, choose_run, flat_name, full_name
from r1hpc.base.cli import ArgumentParser, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir

if TYPE_CHECKING:  # --help must be quick
    from r1hpc.telemetry.records.metrics import Step
    from r1hpc.telemetry.trackers.tensorboard import TensorBoardWriter

_LEAST_PERIOD_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if not _LEAST_PERIOD_S <= arguments.every <= 86400:
        raise UsageError(f"--every {arguments.every:g} is not between {_LEAST_PERIOD_S:g} and 86400 seconds")
    if arguments.to == "wandb" and (arguments.follow or arguments.out):
        raise UsageError("--to wandb takes neither --follow nor --out: export once the run has got somewhere")
    run = choose_run(arguments.run_dir, arguments.run_root)
    written = _TARGETS[arguments.to](run, arguments)
    text = ", ".join(f"{key} {value}" for key, value in written.items())
    print_result({"run_id": full_name(run), "to": arguments.to, **written}, text, arguments.json)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.export_metrics", description=__doc__)
    add_run(parser)
    parser.add_argument("--to", choices=tuple(_TARGETS), required=True)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--follow", action="store_true", help="go on until the run is over")
    parser.add_argument("--every", type=float, default=15.0, metavar="S", help="--follow: seconds (15)")
    parser.add_argument("--project", default="r1hpc", help="--to wandb: the project")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _to_tensorboard(run: RunDir, arguments: Any) -> dict[str, Any]:
    from r1hpc.telemetry.gpu.history import all_series, read_gpus
    from r1hpc.telemetry.records.metrics import read_steps
    from r1hpc.telemetry.trackers.tensorboard import TensorBoardWriter

    folder = (arguments.out / flat_name(run)) if arguments.out else run.report / "tensorboard"
    with TensorBoardWriter(folder) as writer:
        if arguments.follow:
            count = _stream(run, writer, arguments.every)
        else:
            count = writer.steps(read_steps(run).effective.values())
        writer.gpus(all_series(read_gpus(run)))
    return {"steps": count, "folder": str(folder)}


def _stream(run: RunDir, writer: "TensorBoardWriter", every_s: float) -> int:
    """Send all steps in order, then new ones as they come."""
    from r1hpc.telemetry.records.metrics import follow_steps

    newer = follow_steps(run)
    count = 0
    for _ in _until_over(run, every_s):
        count += writer.steps(_available(newer))
        writer.flush()
    return count


def _available(newer: "Callable[[], list[Step]]") -> "Iterator[Step]":
    while steps := newer():
        yield from steps


def _to_prometheus(run: RunDir, arguments: Any) -> dict[str, Any]:
    from r1hpc.telemetry.trackers.prometheus import textfile_of, write_textfile

    if arguments.out is not None and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is no folder: name the textfile collector's own")
    path = textfile_of(run, arguments.out)
    mode = 0o600 if arguments.out is None else 0o644
    for _ in _until_over(run, arguments.every) if arguments.follow else (None,):
        write_textfile(run, path, mode, full_name(run))
    return {"file": str(path)}


def _to_wandb(run: RunDir, arguments: Any) -> dict[str, Any]:
    from r1hpc.telemetry.records.metrics import read_steps
    from r1hpc.telemetry.trackers.wandb import WandbWriter

    with WandbWriter(run, run.report, project=arguments.project) as writer:
        count = writer.steps(read_steps(run).effective.values())
    return {"steps": count, "project": arguments.project}


def _until_over(run: RunDir, every_s: float) -> Iterator[None]:
    """Yield now, every `every_s` seconds, and once after the run is over."""
    from r1hpc.attempt.state.state import read_situation

    over = False
    while True:
        yield
        if over:
            return
        over = read_situation(run).state.is_over
        if not over:
            time.sleep(every_s)


_TARGETS: dict[str, Callable[[RunDir, Any], dict[str, Any]]] = {
    "tensorboard": _to_tensorboard,
    "prometheus": _to_prometheus,
    "wandb": _to_wandb,
}


if __name__ == "__main__":
    run_command(main)
