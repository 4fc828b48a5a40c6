"""The trained model of a run, as a Hugging Face folder.

    python -m r1hpc.export RUN --out DIR             # what the run finished with, else its newest checkpoint
    python -m r1hpc.export RUN --out DIR --step 500  # the model of one checkpoint

    AutoModelForCausalLM.from_pretrained(DIR)

A checkpoint is verified first, and converted on this machine's CPU: in the precision of the training,
adapters merged. Metrics for TensorBoard, Prometheus or W&B: python -m r1hpc.export_metrics.
"""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import add_run, choose_run, full_name
from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.rundir import RunDir

if TYPE_CHECKING:
    from r1hpc.checkpoint.store import Checkpoint

_TRAINED = ("pretrain", "sft", "rl")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.to is not None:
        raise UsageError(
            f"metrics have a command of their own: python -m r1hpc.export_metrics RUN --to {arguments.to}"
        )
    if arguments.out is None:
        raise UsageError("where shall the model go? Give --out DIR")
    run = choose_run(arguments.run_dir, arguments.run_root)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise UsageError(f"--out {arguments.out} is there already: name a new folder, or an empty one")
    done = _export(run, arguments.out.absolute(), arguments.step)
    if arguments.json:
        print_json({"run_id": full_name(run), "folder": str(arguments.out.absolute()), **done})
    else:
        step = "" if done["step"] is None else f", step {done['step']}"
        print(f"{arguments.out}: the model of {full_name(run)}{step}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.export", description=__doc__)
    add_run(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="of this checkpoint; default the newest")
    parser.add_argument("--to", metavar="TOOL", help="metrics: see python -m r1hpc.export_metrics")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _export(run: RunDir, out: Path, step: int | None) -> dict[str, Any]:
    """Make the folder; {"source": what it was made from, "step": of the checkpoint}."""
    if step is None and run.finished.exists() and run.model.is_dir():
        _copy(run.model, out)
        return {"source": str(run.model), "step": None}
    checkpoint = _checkpoint(run, step)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed says how far it is
        _convert(run, checkpoint, out)
    return {"source": str(checkpoint.path), "step": checkpoint.step}


def _copy(model: Path, out: Path) -> None:
    """A copy that appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        shutil.copytree(model, staging)
        staging.rename(out)  # also over an empty folder
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _checkpoint(run: RunDir, step: int | None) -> "Checkpoint":
    """The checkpoint of a step, else the newest that verifies.

    Raises:
        UsageError: there is none of this step; names those that there are.
        StateError: there is none at all, or none that is as it was committed.
    """
    from r1hpc.checkpoint.store import CheckpointStore

    store = CheckpointStore(run.checkpoints)
    if step is None:
        newest = store.newest_verified()
        if newest is None:
            raise StateError(f"{run.run_id} has committed no checkpoint yet, and has no finished model")
        return newest
    found = {checkpoint.step: checkpoint for checkpoint in store.list()}
    if step not in found:
        there = f"there are {', '.join(map(str, sorted(found)))}" if found else "there is none"
        raise UsageError(f"{run.run_id} has no checkpoint of step {step}: {there}")
    problems = store.verify(found[step])
    if problems:
        raise StateError(f"the checkpoint of step {step} is not as it was committed: {'; '.join(problems)}")
    return found[step]


def _convert(run: RunDir, checkpoint: "Checkpoint", out: Path) -> None:
    from r1hpc.config.load import read

    config = read(run.config)
    if config.stage not in _TRAINED:
        raise UsageError(f"{run.run_id} is of stage {config.stage}, which trains no model")
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for a card otherwise
    from tokenizers import Tokenizer

    from r1hpc.tasks.tokenizer import load_tokenizer
    from r1hpc.train.export_checkpoint import export_checkpoint

    if config.stage != "pretrain":
        own = load_tokenizer(config.model)
        export_checkpoint(config, checkpoint, out, own, own.get_vocab_size())
        return
    from r1hpc.attempt.begin import read_facts
    from r1hpc.data.reader import open_dataset

    dataset = open_dataset(read_facts(run, checkpoint.manifest.attempt).dataset_path)
    file = dataset.tokenizer_path and dataset.tokenizer_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file and file.is_file() else None
    export_checkpoint(config, checkpoint, out, tokenizer, dataset.vocab_size)


if __name__ == "__main__":
    run_command(main)
