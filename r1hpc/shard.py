"""Datasets of tokens: build one from a recipe, audit every byte of it, look inside.

    python -m r1hpc.shard build stdlib --out data/stdlib --workers 4
    python -m r1hpc.shard verify data/stdlib
    python -m r1hpc.shard inspect data/stdlib --doc 12
    python -m r1hpc.shard trace data/stdlib --seq-len 256 --seed 0 --sample 4711
    python -m r1hpc.shard plan web.yaml; python -m r1hpc.shard status data/web; ... audit data/web

RECIPE is a YAML file, or the name of one in shards/. Building where the same recipe's dataset
already is does nothing. A build that is killed leaves a .staging- folder, with which the next build
for the same DIR goes on; it is gone when the dataset is there.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1hpc.base.cli import ArgumentParser, print_json, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.units import format_bytes, format_duration

_EXAMPLES = """examples:
  python -m r1hpc.shard build smoke --out data/smoke
  python -m r1hpc.shard verify data/smoke
  python -m r1hpc.shard inspect data/smoke --doc 0
"""


def main(argv: Sequence[str]) -> int:
    """Run one subcommand and return its exit status."""
    parser, subcommands = _parsers()
    if not argv or argv[0] not in subcommands:
        parser.parse_args(list(argv))
    # The subcommand's own parser, because only it knows which of its flags is nearest to an unknown one.
    arguments = subcommands[argv[0]].parse_args(list(argv[1:]))
    run = {
        "build": _build,
        "plan": _plan,
        "status": _status,
        "audit": _audit,
        "verify": _verify,
        "inspect": _inspect,
        "trace": _trace,
    }
    return run[argv[0]](arguments)


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(prog="python -m r1hpc.shard", description=__doc__, epilog=_EXAMPLES)
    subcommands = parser.add_subparsers(
        dest="subcommand", required=True, metavar="build|plan|status|audit|verify|inspect|trace"
    )
    build = subcommands.add_parser("build", help="make a dataset from a recipe")
    build.add_argument("recipe", metavar="RECIPE", help="recipe file, or its name in shards/")
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the dataset will be")
    build.add_argument("--workers", metavar="N", type=int, default=1, help="writer processes (default 1)")
    build.add_argument(
        "--engine", choices=["local"], default="local", help="where the parts are made (default local)"
    )
    plan = subcommands.add_parser("plan", help="what a build would read, and in how many parts")
    plan.add_argument("recipe", metavar="RECIPE", help="recipe file, or its name in shards/")
    status = subcommands.add_parser("status", help="how far a build is, from another shell")
    audit = subcommands.add_parser(
        "audit", help="what was kept of the inputs, and what dropped by which rule"
    )
    verify = subcommands.add_parser("verify", help="audit every byte; exit status 1 names each bad file")
    inspect = subcommands.add_parser("inspect", help="what a dataset holds")
    trace = subcommands.add_parser("trace", help="which documents one training sample was made of")
    trace.add_argument(
        "--run", metavar="RUN", help="the run whose sample it is: no other flag about it is needed"
    )
    trace.add_argument("--seq-len", type=int, help="data.seq_len of the run; not needed for traces")
    trace.add_argument("--seed", type=int, help="data.seed of the run (default 0)")
    which = trace.add_mutually_exclusive_group(required=True)
    which.add_argument("--sample", type=int, help="sample id, counted over all epochs")
    which.add_argument("--step", type=int, help="optimizer step, from 1; with --rank and --row")
    which.add_argument("--doc", metavar="N", type=int, help="which samples hold this document; with --steps")
    trace.add_argument("--rank", type=int, default=0, help="with --step (default 0)")
    trace.add_argument("--row", type=int, default=0, help="row of its batch, with --step (default 0)")
    trace.add_argument("--steps", type=int, help="with --doc: look at steps 1 to this")
    trace.add_argument(
        "--global-batch-size", metavar="N", type=int, help="of the run; for mixtures and steps"
    )
    trace.add_argument("--micro-batch-size", metavar="N", type=int, help="of the run (default 1)")
    trace.add_argument("--world-size", metavar="N", type=int, help="ranks of the run (default 1)")
    for subcommand in (status, audit, verify, inspect, trace):
        subcommand.add_argument("dir", metavar="DIR", type=Path)
    inspect.add_argument("--doc", metavar="N", type=int, help="also print document N, decoded")
    for subcommand in (build, plan, status, audit, verify, inspect, trace):
        subcommand.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser, {
        "build": build,
        "plan": plan,
        "status": status,
        "audit": audit,
        "verify": verify,
        "inspect": inspect,
        "trace": trace,
    }


def _build(arguments: Namespace) -> int:
    from r1hpc.data.build import build_dataset
    from r1hpc.data.recipe import find_recipe

    began = time.monotonic()
    report = build_dataset(
        find_recipe(arguments.recipe), arguments.out, workers=arguments.workers, report=_tell
    )
    if arguments.json:
        print_json(asdict(report) | {"path": str(report.path)})
        return 0
    what = "built" if report.built else "already there, nothing to do"
    print(f"{report.path}: {what} ({format_duration(time.monotonic() - began)})")
    print(f"  id         {report.id}")
    print(f"  tokens     {report.num_tokens:,} in {report.num_documents:,} documents")
    print(f"  vocabulary {report.vocab_size:,}")
    if report.note:
        print(f"  note       {report.note}")
    return 0


def _tell(line: str) -> None:
    """Progress of a build, beside its result."""
    print(line, file=sys.stderr, flush=True)


def _plan(arguments: Namespace) -> int:
    from r1hpc.data.recipe import find_recipe, load_recipe
    from r1hpc.data.sources import list_spans
    from r1hpc.data.stages import describe

    recipe = load_recipe(find_recipe(arguments.recipe))
    found = describe(recipe, list_spans(recipe))
    if arguments.json:
        print_json(found)
        return 0
    for source in found["sources"]:
        size = format_bytes(source["bytes"])
        print(f"source {source['name']}: {source['files']:,} files of {source['kind']}, {size}")
    for stage, count in found["stages"].items():
        print(f"stage {stage}: {count:,} {'unit' if count == 1 else 'units'}")
    return 0


def _status(arguments: Namespace) -> int:
    from r1hpc.data.progress import read_progress

    found = read_progress(arguments.dir)
    if arguments.json:
        print_json(found)
        return 0
    state = {
        "done": f"done, dataset {found.get('id', '')[:12]}",
        "building": "being built",
        "stopped": "stopped: build again to go on",
        "none": "no build and no dataset there",
    }[found["state"]]
    print(f"{arguments.dir}: {state}")
    for stage in found["stages"]:
        rate = f", {format_bytes(stage['bytes_per_second'])}/s" if stage["bytes_per_second"] else ""
        left = f", about {format_duration(stage['left_s'])} left" if stage["left_s"] else ""
        print(f"  {stage['stage']}: {stage['done']} of {stage['units']}{rate}{left}")
    return 0


def _audit(arguments: Namespace) -> int:
    from r1hpc.data.describe import audit

    found = audit(arguments.dir)
    if arguments.json:
        print_json(found)
        return 0
    for source in found["sources"]:
        documents = source["documents"]
        print(f"{source['name']}: {documents['kept']:,} of {documents['in']:,} records kept")
        for rule, count in sorted(documents["dropped"].items(), key=lambda item: -item[1]):
            print(f"  {count:>10,} {rule}")
        share = f", {found['mix'][source['name']]:.1%} of the mixture" if "mix" in found else ""
        print(f"  {found['tokens'][source['name']]:>10,} tokens{share}")
    return 0


def _verify(arguments: Namespace) -> int:
    from r1hpc.data.audit import audit_dataset, unlisted_files
    from r1hpc.data.manifest import read_manifest

    manifest = read_manifest(arguments.dir)
    problems = list(audit_dataset(manifest))
    unlisted = unlisted_files(manifest)
    num_bytes = sum(entry["size"] for entry in manifest.files.values())
    if arguments.json:
        result = {"id": manifest.id, "ok": not problems, "num_files": len(manifest.files)}
        print_json(result | {"problems": [asdict(problem) for problem in problems], "unlisted": unlisted})
        return 1 if problems else 0
    for problem in problems:
        print(f"BAD  {printable(str(problem))}")
    for name in unlisted:
        print(f"note {printable(name)}: not part of the dataset")
    verdict = f"{len(problems)} of {len(manifest.files)} files are bad" if problems else "sound"
    print(f"{arguments.dir}: {verdict} ({len(manifest.files)} files, {format_bytes(num_bytes)})")
    print(f"  id         {manifest.id}")
    return 1 if problems else 0


def _inspect(arguments: Namespace) -> int:
    from r1hpc.data.describe import describe

    described = describe(arguments.dir, arguments.doc)
    if arguments.json:
        print_json(described)
    else:
        _print_description(described)
    return 0


def _trace(arguments: Namespace) -> int:
    from r1hpc.data.describe import SampleOrder, trace_sample

    if arguments.run is not None:
        _fill_in(arguments)
    order = SampleOrder(arguments.seq_len, arguments.seed or 0, arguments.global_batch_size)
    if arguments.doc is not None:
        return _trace_document(arguments, order)
    sample = arguments.sample if arguments.step is None else _sample_of(arguments)
    found, documents = trace_sample(arguments.dir, sample, order)
    if arguments.json:
        print_json(found | {"documents": documents})
        return 0
    place = f"tokens {found['token_start']} to {found['token_stop'] - 1}"
    print(f"sample {sample}: {place} of {arguments.dir.absolute()}")
    for document in documents:
        _print_document(document)
    return 0


def _fill_in(arguments: Namespace) -> None:
    """What a run's plan says, where no flag says otherwise (an attempt on fewer nodes has other ranks)."""
    from r1hpc.base.files import read_json
    from r1hpc.base.rundir import open_run
    from r1hpc.config.load import read

    run = open_run(arguments.run)
    data, plan = read(run.config).data, read_json(run.plan)
    topology, batch = plan["topology"], plan["batch"]
    known = {
        "seq_len": data.seq_len,
        "seed": data.seed,
        "global_batch_size": batch["global_batch_size"],
        "micro_batch_size": batch["micro_batch_size"],
        "world_size": topology["num_nodes"] * topology["ranks_per_node"],
    }
    for name, value in known.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def _sample_of(arguments: Namespace) -> int:
    from r1hpc.data.describe import sample_of
    from r1hpc.data.order import RankShare

    if arguments.global_batch_size is None:
        raise UsageError("--global-batch-size is needed with --step")
    share = RankShare(
        arguments.global_batch_size,
        arguments.micro_batch_size or 1,
        arguments.rank,
        arguments.world_size or 1,
    )
    return sample_of(arguments.step, arguments.row, share)


def _trace_document(arguments: Namespace, order: Any) -> int:
    from r1hpc.data.describe import trace_document

    if arguments.steps is None or arguments.global_batch_size is None:
        raise UsageError("--steps and --global-batch-size are needed with --doc")
    num_samples = arguments.steps * arguments.global_batch_size
    found = trace_document(arguments.dir, arguments.doc, order, num_samples)
    if arguments.json:
        print_json(found)
        return 0
    _print_document(found["document"])
    steps = ", ".join(str(step) for step in found["steps"])
    print(f"  seen in {len(found['samples']):,} samples of {arguments.steps:,} steps: {steps or 'none'}")
    return 0


def _print_document(document: dict[str, Any]) -> None:
    """Where a document comes from, and what was decided about it."""
    decided = document["decisions"] or {}
    size = f", {decided['size']:,} bytes" if decided.get("size") else ""
    place = f"{printable(document['path'])} at {document['position']}{size}"
    print(f"  document {document['number']}: {document['source']}, {place}")
    print(f"    licence: {printable(document['license'])}")
    edits = {name: decided.get(name) for name in ("repaired", "masked", "lines_removed")}
    said = [f"{name} {value}" for name, value in edits.items() if value]
    if decided.get("language"):
        said.insert(0, f"language {decided['language']} {decided['score']:.2f}")
    if decided:
        print(f"    decided: kept{''.join(f', {item}' for item in said)}")


def _print_description(described: dict[str, Any]) -> None:
    print(f"{described['name']}  {described['path']}")
    print(f"  id         {described['id']}")
    print(f"  tokens     {described['num_tokens']:,} in {described['num_documents']:,} documents")
    print(f"  vocabulary {described['vocab_size']:,} ({described['tokenizer']}, {described['dtype']})")
    print(f"  parts      {len(described['parts'])}, profile {described['profile']}")
    for source in described["sources"]:
        counts = f"{source['num_tokens']:,} tokens, {source['num_documents']:,} documents"
        print(f"  source     {source['name']}: {counts}")
        print(f"             licence: {printable(source['license'])}")
        if source["num_skipped"]:
            why = "no traces" if "roles" in described else "not UTF-8"
            print(f"             {source['num_skipped']:,} documents left out: {why}")
    if "roles" in described:
        roles = described["roles"]
        print(
            f"  roles      {roles['prompt']:,} prompt tokens, {roles['completion']:,} of completions (learnt)"
        )
        print(f"  longest    {roles['longest_document']:,} tokens with its EOS; data.seq_len must hold it")
    if "document" in described:
        document = described["document"]
        print(f"  document {document['number']}: {printable(document['path'])} at {document['position']}")
        print(f"  xxh3-128 {document['xxh3_128']}\n")
        for role in ("prompt", "completion") if "prompt" in document else ():
            print(f"  {role}: {printable(document[role])}")
        if "prompt" not in document:
            print(printable(document["text"]))


if __name__ == "__main__":
    run_command(main)
