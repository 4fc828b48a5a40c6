"""Build a dataset of tokens from a recipe, verify every byte of it, inspect it.

    python -m r1hpc.shard build stdlib --out data/stdlib --workers 4
    python -m r1hpc.shard build web.yaml --out data/web --engine slurm --jobs 16 -p cpu -c 8 -t 4:00:00
    python -m r1hpc.shard verify data/stdlib
    python -m r1hpc.shard inspect data/stdlib --doc 12
    python -m r1hpc.shard trace data/stdlib --seq-len 256 --seed 0 --sample 4711
    python -m r1hpc.shard plan web.yaml; python -m r1hpc.shard status data/web; ... audit data/web

RECIPE is a YAML file, or the name of one in shards/. If the dataset of the same recipe is already there,
building does nothing. A killed build leaves a .staging- folder; the next build for the same DIR continues
from it and removes it at the end.
"""

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import ArgumentParser, add_json, offer, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.tables import wrap
from r1hpc.base.units import format_bytes, format_duration
from r1hpc.slurm.flags import add_flags

if TYPE_CHECKING:
    from r1hpc.corpus.build.build import BuildReport

_EXAMPLES = """examples:
  python -m r1hpc.shard build smoke --out data/smoke
  python -m r1hpc.shard verify data/smoke
  python -m r1hpc.shard inspect data/smoke --doc 0
"""


def main(argv: Sequence[str]) -> int:
    """Run one subcommand and return its exit status."""
    parser, subcommands = _parsers()
    if not argv or argv[0] not in subcommands:
        parser.parse_args(argv)
    # The subcommand's own parser knows which of its flags is nearest to an unknown one.
    arguments = subcommands[argv[0]].parse_args(argv[1:])
    run, _ = _SUBCOMMANDS[argv[0]]
    return run(arguments)


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(prog="python -m r1hpc.shard", description=__doc__, epilog=_EXAMPLES)
    added = parser.add_subparsers(dest="subcommand", required=True, metavar="|".join(_SUBCOMMANDS))
    found: dict[str, ArgumentParser] = {
        name: added.add_parser(name, help=purpose) for name, (_, purpose) in _SUBCOMMANDS.items()
    }
    for name, each in found.items():
        if name in ("build", "plan"):
            recipe = each.add_argument("recipe", metavar="RECIPE", help="recipe file, or its name in shards/")
            offer(recipe, "r1hpc.config.assets:recipes")
        else:
            each.add_argument("dir", metavar="DIR", type=Path)
        add_json(each)
    _add_build_flags(found["build"])
    found["inspect"].add_argument("--doc", metavar="N", type=int, help="also print document N, decoded")
    _add_trace_flags(found["trace"])
    return parser, found


def _add_build_flags(build: ArgumentParser) -> None:
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the dataset will be")
    build.add_argument("--workers", metavar="N", type=int, default=1, help="writer processes (default 1)")
    build.add_argument(
        "--check-inputs", action="store_true", help="record digests of the inputs; compare them if it exists"
    )
    build.add_argument(
        "--engine",
        choices=["local", "slurm"],
        default="local",
        help="where to make the parts (default local)",
    )
    build.add_argument(
        "--jobs", metavar="N", type=int, help="with slurm: jobs that each stage is dealt to (default 4)"
    )
    build.add_argument("--cluster", metavar="NAME", help="with slurm: profile; default $R1HPC_CLUSTER")
    add_flags(build, leave_out=("--nodes", "--job-name", "--gpus-per-node"))
    # For the jobs of --engine slurm.
    for name in ("--stage", "--share", "--recipe-hash"):
        build.add_argument(name, help=argparse.SUPPRESS)
    build.add_argument("--after-others", action="store_true", help=argparse.SUPPRESS)


def _add_trace_flags(trace: ArgumentParser) -> None:
    trace.add_argument(
        "--run", metavar="RUN", help="the run whose sample it is: no other flag about it is needed"
    )
    trace.add_argument("--seq-len", type=int, help="data.seq_len of the run; not needed for traces")
    trace.add_argument("--seed", type=int, help="data.seed of the run (default 0)")
    which = trace.add_mutually_exclusive_group(required=True)
    which.add_argument("--sample", type=int, help="sample id, counted over all epochs")
    which.add_argument("--step", type=int, help="optimizer step, from 1; with --rank and --row")
    trace.add_argument("--rank", type=int, default=0, help="with --step (default 0)")
    trace.add_argument("--row", type=int, default=0, help="row of its batch, with --step (default 0)")
    trace.add_argument(
        "--global-batch-size", metavar="N", type=int, help="of the run; for mixtures and steps"
    )
    trace.add_argument("--micro-batch-size", metavar="N", type=int, help="of the run (default 1)")
    trace.add_argument("--world-size", metavar="N", type=int, help="ranks of the run (default 1)")


def _build(arguments: Namespace) -> int:
    from r1hpc.corpus.build.build import build_dataset
    from r1hpc.corpus.inspect.describe import audit
    from r1hpc.reporting.dataset_text import count_lines

    if arguments.engine == "slurm":
        return _build_on_slurm(arguments)
    _refuse_flags_of_slurm(arguments)
    if arguments.stage is not None:
        return _build_share(arguments)
    began = time.monotonic()
    how = _how(arguments) | {"check_inputs": arguments.check_inputs}
    report = build_dataset(_recipe_as_submitted(arguments), arguments.out, **how)
    what = "built" if report.built else "already there, nothing to do"
    counts = audit(report.path)
    lines = [
        f"{report.path}: {what} ({format_duration(time.monotonic() - began)})",
        f"  id         {report.id}",
        f"  tokens     {report.num_tokens:,} in {report.num_documents:,} documents",
        f"  vocabulary {report.vocab_size:,}",
        *count_lines(counts),
        *_note(report),
    ]
    shown = asdict(report) | {"path": str(report.path)}
    return _print(shown | {name: counts[name] for name in ("documents", "sources")}, lines, arguments)


def _note(report: "BuildReport") -> list[str]:
    return [f"  note       {report.note}"] if report.note else []


def _refuse_flags_of_slurm(arguments: Namespace) -> None:
    """Refuse Slurm's flags without --engine slurm: the build would run here, perhaps on a login node."""
    from r1hpc.slurm.flags import overrides_from_flags

    given = ["--jobs"] * (arguments.jobs is not None) + ["--cluster"] * (arguments.cluster is not None)
    given += overrides_from_flags(arguments)
    if given:
        raise UsageError(f"{given[0]} is for --engine slurm: add that, or leave it out")


def _build_on_slurm(arguments: Namespace) -> int:
    from r1hpc.corpus.build.build import find_dataset
    from r1hpc.corpus.build.slurm_jobs import DatasetOrder, submit_dataset
    from r1hpc.corpus.recipe import find_recipe
    from r1hpc.slurm.flags import all_overrides

    recipe = find_recipe(arguments.recipe)
    existing = find_dataset(recipe, arguments.out, arguments.check_inputs)
    overrides = tuple(all_overrides((), arguments))
    num_jobs = 4 if arguments.jobs is None else arguments.jobs
    order = DatasetOrder(
        recipe, arguments.out, num_jobs, overrides, arguments.cluster, arguments.check_inputs
    )
    jobs: dict[str, str] = {}
    if existing is not None:
        lines = [f"{existing.path}: already there, nothing to do", *_note(existing)]
    else:
        jobs = submit_dataset(order)
        lines = [
            f"{arguments.out}: jobs {', '.join(f'{job} ({stage})' for stage, job in jobs.items())}",
            f"  how far it is: python -m r1hpc.shard status {arguments.out}",
        ]
    return _print({"path": str(arguments.out), "built": False, "jobs": jobs}, lines, arguments)


def _recipe_as_submitted(arguments: Namespace) -> Path:
    """Return the recipe's file, after checking that it is unchanged since the build was submitted."""
    from r1hpc.corpus.recipe import find_recipe, load_recipe

    path = find_recipe(arguments.recipe)
    if arguments.recipe_hash is not None and load_recipe(path).hash != arguments.recipe_hash:
        raise UsageError(
            f"{path} has changed since the jobs of this build were submitted: cancel those that wait, and "
            "submit again (or bring it back as it was; parts that are done are kept)"
        )
    return path


def _build_share(arguments: Namespace) -> int:
    """Run one share of a build in a job of `--engine slurm`: --stage STAGE --share INDEX/COUNT."""
    from r1hpc.corpus.build.build import build_share
    from r1hpc.corpus.build.stages import Share

    index, _, count = (arguments.share or "").partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UsageError(f"--share {printable(arguments.share or '')!r} is not INDEX/COUNT, as in 2/8")
    share, recipe = Share(arguments.stage, int(index), int(count)), _recipe_as_submitted(arguments)
    build_share(recipe, arguments.out, share, **_how(arguments))
    return 0


def _how(arguments: Namespace) -> dict[str, Any]:
    return {"workers": arguments.workers, "after_others": arguments.after_others, "report": _tell}


def _tell(line: str) -> None:
    """Print a build's progress on stderr, apart from its result."""
    print(line, file=sys.stderr, flush=True)


def _plan(arguments: Namespace) -> int:
    from r1hpc.corpus.build.stages import describe
    from r1hpc.corpus.recipe import find_recipe, load_recipe
    from r1hpc.corpus.sources.read import list_spans
    from r1hpc.reporting.dataset_text import plan_lines

    recipe = load_recipe(find_recipe(arguments.recipe))
    found = describe(recipe, list_spans(recipe))
    return _print(found, plan_lines(found), arguments)


def _status(arguments: Namespace) -> int:
    from r1hpc.corpus.engine.work_dir import read_progress
    from r1hpc.reporting.dataset_text import progress_lines

    found = read_progress(arguments.dir)
    return _print(found, progress_lines(arguments.dir, found), arguments)


def _audit(arguments: Namespace) -> int:
    from r1hpc.corpus.inspect.describe import audit
    from r1hpc.reporting.dataset_text import audit_lines

    found = audit(arguments.dir)
    return _print(found, audit_lines(found), arguments)


def _verify(arguments: Namespace) -> int:
    from r1hpc.corpus.inspect.verify import unlisted_files, verify_dataset
    from r1hpc.data.format.manifest import read_manifest
    from r1hpc.reporting.dataset_text import progress_bar

    manifest = read_manifest(arguments.dir)
    num_bytes = sum(entry["size"] for entry in manifest.files.values())
    with progress_bar("verifying", num_bytes) as advance:
        problems = list(verify_dataset(manifest, advance))
    unlisted, num_files = unlisted_files(manifest), len(manifest.files)
    shown = {
        "id": manifest.id,
        "ok": not problems,
        "num_files": num_files,
        "problems": [asdict(problem) for problem in problems],
        "unlisted": unlisted,
    }
    verdict = f"{len(problems)} of {num_files} files are bad" if problems else "sound"
    lines = [
        *(f"BAD  {printable(str(problem))}" for problem in problems),
        *(f"note {printable(name)}: not part of the dataset" for name in unlisted),
        f"{arguments.dir}: {verdict} ({num_files} files, {format_bytes(num_bytes)})",
        f"  id         {manifest.id}",
    ]
    _print(shown, lines, arguments)
    return 1 if problems else 0


def _inspect(arguments: Namespace) -> int:
    from r1hpc.corpus.inspect.describe import describe
    from r1hpc.reporting.dataset_text import description_lines

    found = describe(arguments.dir, arguments.doc)
    return _print(found, description_lines(found), arguments)


def _print(shown: dict[str, Any], lines: Iterable[str], arguments: Namespace) -> int:
    print_result(shown, "\n".join(lines), arguments.json)
    return 0


def _trace(arguments: Namespace) -> int:
    from r1hpc.corpus.inspect.describe import SampleOrder, fill_in, trace_sample
    from r1hpc.reporting.dataset_text import document_lines

    of_run: dict[str, Any] = fill_in(arguments) if arguments.run is not None else {}
    order = SampleOrder(arguments.seq_len, arguments.seed or 0, arguments.global_batch_size, **of_run)
    sample = arguments.sample if arguments.step is None else _sample_of(arguments)
    found, documents = trace_sample(arguments.dir, sample, order)
    place = f"tokens {found['token_start']} to {found['token_stop'] - 1}"
    lines = [f"sample {sample}: {place} of {arguments.dir.absolute()}"]
    if arguments.step is not None:
        found["layout"] = _layout(arguments)
        layout = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in found["layout"].items())
        lines.append(wrap(f"  if the ranks shared the batch as in {layout}", "", "  "))
    lines += [line for document in documents for line in document_lines(document)]
    return _print(found | {"documents": documents}, lines, arguments)


def _sample_of(arguments: Namespace) -> int:
    from r1hpc.corpus.inspect.describe import sample_of
    from r1hpc.data.read.order import RankShare

    if arguments.global_batch_size is None:
        raise UsageError("--global-batch-size is needed with --step")
    share = RankShare(rank=arguments.rank, **_layout(arguments))
    return sample_of(arguments.step, arguments.row, share)


def _layout(arguments: Namespace) -> dict[str, int]:
    return {
        "world_size": arguments.world_size or 1,
        "micro_batch_size": arguments.micro_batch_size or 1,
        "global_batch_size": arguments.global_batch_size,
    }


_SUBCOMMANDS: dict[str, tuple[Callable[[Namespace], int], str]] = {
    "build": (_build, "make a dataset from a recipe"),
    "plan": (_plan, "inputs and number of parts of a build"),
    "status": (_status, "how far a build is, from another shell"),
    "audit": (_audit, "what each rule kept or dropped"),
    "verify": (_verify, "audit every byte; exit status 1 names each bad file"),
    "inspect": (_inspect, "what a dataset holds"),
    "trace": (_trace, "which documents one training sample was made of"),
}


if __name__ == "__main__":
    run_command(main)
