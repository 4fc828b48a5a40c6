"""Export the trained model of a run as a Hugging Face folder.

    python -m r1hpc.export RUN --out DIR             # the final model, else that of the newest checkpoint
    python -m r1hpc.export RUN --out DIR --step 500  # the model of one checkpoint
    python -m r1hpc.export MODEL.gguf --out DIR      # a model in GGUF, to start a run from
    python -m r1hpc.export RUN --out DIR --quantize int8 --calibrate           # integers, for vLLM
    python -m r1hpc.export FOLDER --out DIR --quantize w4a16 --task-of RUN     # any model folder

    AutoModelForCausalLM.from_pretrained(DIR)

A checkpoint is verified first, then converted on this machine's CPU in the training precision, with adapters
merged. Metrics for TensorBoard, Prometheus or W&B: python -m r1hpc.export_metrics.

A quantised export is read back and answers the run's held-out questions, like its original. Exit status 1:
the test cannot show that it is no worse than the original; the folder stays.
"""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from r1hpc.base.choose_run import RUN_NAMES, add_run, choose_run, full_name, has_model
from r1hpc.base.cli import ArgumentParser, add_json, offer, print_result, run_command
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.base.tables import ANY_WIDTH, format_table

if TYPE_CHECKING:
    from r1hpc.checkpoint.store import Checkpoint
    from r1hpc.train.quantize.measure import Report

_Made = TypeVar("_Made")
_SCHEMES = ("int8", "w4a16")
_NUM_TEXTS = 128
_MARGIN = 0.02


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    _check_flags(arguments)
    source, out = _source(arguments), arguments.out.resolve()
    if arguments.step is not None and not isinstance(source, RunDir):
        raise UsageError(f"--step is of a run's checkpoints, and {source} is no run: leave it out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {arguments.out} is there already: name a new folder, or an empty one")
    if arguments.quantize is not None:
        return _quantized(source, out, arguments)
    done = _export(source, out, arguments.step) if isinstance(source, RunDir) else _from_gguf(source, out)
    print_result(_as_json(source, out, done), _made(source, arguments.out, done), arguments.json)
    return 0


def _source(arguments: Any) -> RunDir | Path:
    """Return a run, a GGUF file, or a folder with a model to quantise."""
    given = Path(arguments.run_dir or "")
    if given.suffix == ".gguf":
        if arguments.quantize is not None:
            raise UsageError(f"make a folder of it first, by export {given} --out FOLDER; then quantise that")
        return given
    if arguments.quantize is not None and arguments.run_dir and (given / "config.json").is_file():
        return given
    return choose_run(
        arguments.run_dir,
        arguments.run_root,
        lambda run: has_model(run) or any(run.checkpoints.glob("step-*")),
    )


def _as_json(source: RunDir | Path, out: Path, done: dict[str, Any]) -> dict[str, Any]:
    return {"run_id": full_name(source) if isinstance(source, RunDir) else None, "folder": str(out), **done}


def _made(source: RunDir | Path, out: Path, done: dict[str, Any]) -> str:
    name = full_name(source) if isinstance(source, RunDir) else str(source)
    step = "" if done["step"] is None else f", step {done['step']}"
    return f"{out}: the model of {name}{step}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.export", description=__doc__)
    add_run(
        parser, "a run, a chain (its newest model), a model in GGUF, or with --quantize a Hugging Face folder"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to make")
    parser.add_argument("--step", type=int, metavar="N", help="of this checkpoint; default the newest")
    parser.add_argument("--to", metavar="TOOL", help="metrics: see python -m r1hpc.export_metrics")
    add_json(parser)
    integers = parser.add_argument_group("integers")
    integers.add_argument(
        "--quantize", choices=_SCHEMES, help="weights and activations of 8 bits, or weights of 4 alone"
    )
    integers.add_argument(
        "--calibrate",
        type=int,
        nargs="?",
        const=_NUM_TEXTS,
        metavar="N",
        help=f"int8: SmoothQuant, on N texts of the run's task ({_NUM_TEXTS})",
    )
    of = integers.add_argument("--task-of", metavar="RUN", help="the run whose questions are used")
    offer(of, RUN_NAMES)
    integers.add_argument("--num-questions", type=int, metavar="N", help="default evaluate.num_items, or 256")
    integers.add_argument(
        "--margin",
        type=float,
        metavar="SHARE",
        help=f"the loss of accuracy that is to be excluded ({_MARGIN})",
    )
    integers.add_argument("--accept-worse", action="store_true", help="exit status 0 even if it is worse")
    integers.add_argument("--unmeasured", action="store_true", help="skip the test")
    return parser


def _check_flags(arguments: Any) -> None:
    """Refuse a missing --out, --quantize flags without --quantize, and values out of range."""
    if arguments.to is not None:
        raise UsageError(
            f"metrics have a command of their own: python -m r1hpc.export_metrics RUN --to {arguments.to}"
        )
    if arguments.out is None:
        raise UsageError("--out DIR is required")
    asked = {
        "--calibrate": arguments.calibrate,
        "--task-of": arguments.task_of,
        "--num-questions": arguments.num_questions,
        "--margin": arguments.margin,
        "--accept-worse": arguments.accept_worse or None,
    }
    given = [flag for flag, value in asked.items() if value is not None]
    if arguments.quantize is None and (given or arguments.unmeasured):
        raise UsageError(
            f"{(given or ['--unmeasured'])[0]} is of a quantised export: give --quantize int8 too"
        )
    if arguments.unmeasured and given:
        raise UsageError(f"{given[0]} needs the questions of a run, which --unmeasured leaves out")
    if arguments.calibrate is not None and arguments.quantize != "int8":
        raise UsageError(
            "--calibrate is for int8. GPTQ for w4a16 is in r1hpc's sources: python -m experiments.gptq"
        )
    for flag in ("--calibrate", "--num-questions"):
        if asked[flag] is not None and asked[flag] < 1:
            raise UsageError(f"{flag} {asked[flag]}: give 1 or more")
    if arguments.margin is not None and not 0 < arguments.margin < 1:
        raise UsageError(f"--margin {arguments.margin}: give a share of the questions, between 0 and 1")


def _quantized(source: RunDir | Path, out: Path, arguments: Any) -> int:
    """Make the quantised folder, print its measured quality; return the exit status."""
    task = None if arguments.unmeasured else _task_of(source, arguments)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TQDM_DISABLE"] = "1"  # the libraries' progress bars
    from r1hpc.train.quantize.quantize import check_installed, check_source

    check_installed()
    with _original(source, out, arguments.step) as (original, done):
        check_source(original, calibrated=arguments.calibrate is not None)
        report = _appear(out, lambda staging: _quantize(task, original, staging, arguments))
    found = report.to_json() if report else {"scheme": arguments.quantize}
    lines = _report_lines(report) if report else ["not measured: its loss of accuracy is unknown"]
    text = "\n".join([f"{_made(source, arguments.out, done)}, {arguments.quantize}", *lines])
    print_result({**_as_json(source, out, done), "quantization": found}, text, arguments.json)
    return 0 if report is None or report.verdict.no_worse or arguments.accept_worse else 1


def _task_of(source: RunDir | Path, arguments: Any) -> RunDir:
    """Return the run whose questions are used; raise UsageError if there is none, or it has no task."""
    from r1hpc.config.load import read
    from r1hpc.config.schema.rl import TaskConfig

    chosen = choose_run(arguments.task_of, arguments.run_root) if arguments.task_of else source
    if not isinstance(chosen, RunDir):
        raise UsageError(
            "a quantised export is measured on the questions of a run: name one by --task-of RUN, or take "
            "--unmeasured"
        )
    config = read(chosen.config)
    own_data = config.data.traces or config.data.path  # with own data a default task means nothing
    if config.stage == "pretrain" or (config.stage == "sft" and own_data and config.task == TaskConfig()):
        raise UsageError(
            f"{chosen.run_id} is of stage {config.stage} and has no task to measure on: name a run that has "
            "one by --task-of RUN, or take --unmeasured"
        )
    return chosen


@contextlib.contextmanager
def _original(source: RunDir | Path, out: Path, step: int | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder to quantise, kept until done, and a dict like _export's."""
    if not isinstance(source, RunDir):
        yield source, {"source": str(source), "step": None}
    elif step is None and source.finished.exists() and source.model.is_dir():
        _refuse_damaged(source)
        yield source.model, {"source": str(source.model), "step": None}
    else:
        made = out.with_name(f".{out.name}.{secrets.token_hex(4)}.original")
        try:
            yield made, _export(source, made, step)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _quantize(task: RunDir | None, source: Path, staging: Path, arguments: Any) -> "Report | None":
    """Make the quantised folder; return its quality, measured on the questions of a run, if any."""
    staging.mkdir()
    if task is None:
        from r1hpc.train.quantize.quantize import quantize

        quantize(source, staging, arguments.quantize, None)
        return None
    from r1hpc.config.load import read
    from r1hpc.train.quantize.measure import Asked, export_measured

    asked = Asked(
        scheme=arguments.quantize,
        num_texts=arguments.calibrate or 0,
        num_questions=arguments.num_questions,
        margin=_MARGIN if arguments.margin is None else arguments.margin,
    )
    code = task.code if task.code.is_dir() else None
    with contextlib.redirect_stdout(sys.stderr):
        return export_measured(read(task.config), source, staging, asked, code)


def _report_lines(report: "Report") -> list[str]:
    before, after, found = report.before, report.after, report.comparison
    accuracy, made = found.accuracy, report.quantized
    share = f"{made.num_quantized / made.num_parameters:.0%} of the parameters are integers"
    rows = [
        ("size, MB", f"{before.num_bytes / 1e6:.1f}", f"{after.num_bytes / 1e6:.1f}", share),
        (
            "perplexity",
            f"{before.perplexity:.3f}",
            f"{after.perplexity:.3f}",
            f"of {before.num_tokens:,} held-out tokens",
        ),
        (
            "accuracy",
            f"{accuracy.a:.3f}",
            f"{accuracy.b:.3f}",
            f"{accuracy.b - accuracy.a:+.3f} [{accuracy.low:+.3f}, {accuracy.high:+.3f}], McNemar p "
            f"{found.p_value:.2g}; {found.num_questions:,} questions of {report.questions}, greedy",
        ),
        (
            "tokens a second",
            f"{before.tokens_per_second:.1f}",
            f"{after.tokens_per_second:.1f}",
            f"by transformers on {after.device}, without kernels for integers: vLLM has them",
        ),
    ]
    table = format_table(
        ("", "original", report.asked.scheme, ""), rows, right={1, 2}, width=ANY_WIDTH, indent="  "
    )
    return [table, report.verdict.text]


def _refuse_damaged(run: RunDir) -> None:
    from r1hpc.checkpoint.finished import refuse_damaged  # xxhash

    refuse_damaged(run)


def _export(run: RunDir, out: Path, step: int | None) -> dict[str, Any]:
    """Make the folder; return {"source": the model's origin, "step": of the checkpoint}."""
    if step is None and run.finished.exists() and run.model.is_dir():
        _refuse_damaged(run)
        _appear(out, lambda staging: _copy(run, staging))
        return {"source": str(run.model), "step": None}
    checkpoint = _checkpoint(run, step)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints its progress
        _convert(run, checkpoint, out)
    return {"source": str(checkpoint.path), "step": checkpoint.step}


def _copy(run: RunDir, staging: Path) -> None:
    shutil.copytree(run.model, staging)
    from r1hpc.checkpoint.finished import refuse_copy  # xxhash

    refuse_copy(run, staging)


def _from_gguf(file: Path, out: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UsageError(f"{file} is not there")
    os.environ["DS_ACCELERATOR"] = "cpu"
    from r1hpc.train.quantize.model_folders import convert_gguf

    _appear(out, lambda staging: convert_gguf(file, staging))
    return {"source": str(file), "step": None}


def _appear(out: Path, make: Callable[[Path], _Made]) -> _Made:
    """Call `make` so that its folder appears complete or not at all; return the result of `make`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        made = make(staging)
        staging.rename(out)  # also replaces an empty folder
        return made
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _checkpoint(run: RunDir, step: int | None) -> "Checkpoint":
    """Return the checkpoint of a step, else the newest that verifies.

    Raise UsageError, which lists the steps, if this step has none; StateError if there is none that verifies.
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
    from r1hpc.config.stages import trains

    config = read(run.config)
    if not trains(config.stage):
        raise UsageError(f"{run.run_id} is of stage {config.stage}, which trains no model")
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for a card
    from r1hpc.tasks.text.tokenizer import exported_tokenizer, load_tokenizer, vocabulary_size
    from r1hpc.train.quantize.model_folders import export_checkpoint

    if config.stage != "pretrain":
        own = vocabulary_size(load_tokenizer(config.model))
        export_checkpoint(config, checkpoint, out, exported_tokenizer(config.model, code=run.code), own)
        return
    from r1hpc.attempt.begin import read_facts
    from r1hpc.data.read.reader import open_dataset
    from r1hpc.train.supervised.supervised import tokenizer_of_data

    dataset = open_dataset(read_facts(run, checkpoint.manifest.attempt).dataset_path)
    export_checkpoint(config, checkpoint, out, tokenizer_of_data(dataset), dataset.vocab_size)


if __name__ == "__main__":
    run_command(main)
