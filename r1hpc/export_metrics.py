"""Export a run's metrics to TensorBoard, Prometheus or W&B.

    python -m r1hpc.export_metrics RUN --to tensorboard            # event files in RUN/report/tensorboard/
    python -m r1hpc.export_metrics RUN --to prometheus            # RUN/metrics/r1hpc.prom
    python -m r1hpc.export_metrics RUN --to wandb --project NAME   # offline: WANDB_MODE=offline

TensorBoard and W&B are extras: pip install 'r1hpc[tensorboard]', 'r1hpc[wandb]'. While a run goes on,
monitor.trackers sends the same live. For Prometheus --out is the folder of node_exporter's textfile
collector; everyone can read the file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1hpc.base.choose_run import add_run, choose_run, flat_name, full_name
from r1hpc.base.cli import ArgumentParser, add_json, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.export_metrics", description=__doc__)
    add_run(parser)
    parser.add_argument("--to", choices=("tensorboard", "prometheus", "wandb"), required=True)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to")
    parser.add_argument("--project", default="r1hpc", help="--to wandb: the project")
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.to == "wandb" and arguments.out:
        raise UsageError("--to wandb takes no --out: W&B's own files go to RUN/report/wandb")
    if arguments.to == "prometheus" and arguments.out is not None and not arguments.out.is_dir():
        raise UsageError(f"--out {arguments.out} is no folder: name the textfile collector's own")
    run = choose_run(arguments.run_dir, arguments.run_root)
    written = _export(run, arguments)
    text = ", ".join(f"{key} {value}" for key, value in written.items())
    print_result({"run_id": full_name(run), "to": arguments.to, **written}, text, arguments.json)
    return 0


def _export(run: RunDir, arguments: Any) -> dict[str, Any]:
    """Write the metrics of all lasting steps; return what was written, and where."""
    from r1hpc.config.load import read
    from r1hpc.telemetry.records.metrics import read_steps
    from r1hpc.telemetry.trackers.prometheus import write_textfile
    from r1hpc.telemetry.trackers.writers import TensorBoardWriter, WandbWriter

    if arguments.to == "prometheus":
        return {"file": str(write_textfile(run, arguments.out))}
    with_samples = read(run.config).monitor.samples
    writer: TensorBoardWriter | WandbWriter
    if arguments.to == "tensorboard":
        folder = (arguments.out / flat_name(run)) if arguments.out else run.report / "tensorboard"
        writer, where = TensorBoardWriter(folder, run if with_samples else None), {"folder": str(folder)}
    else:
        writer = WandbWriter(run, run.report, arguments.project, samples=with_samples)
        where = {"project": arguments.project}
    try:
        steps = list(read_steps(run).effective.values())
        writer.steps(steps)
    except BaseException:
        writer.close(failed=True)
        raise
    writer.close()
    return {"steps": len(steps), **where}


if __name__ == "__main__":
    run_command(main)
