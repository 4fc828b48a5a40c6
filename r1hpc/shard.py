"""Datasets of tokens: build one from a recipe, audit every byte of it, look inside.

    python -m r1hpc.shard build stdlib --out data/stdlib --workers 4
    python -m r1hpc.shard verify data/stdlib
    python -m r1hpc.shard inspect data/stdlib --doc 12
    python -m r1hpc.shard trace data/stdlib --seq-len 256 --seed 0 --sample 4711

RECIPE is a YAML file, or the name of one in shards/. Building where the same recipe's dataset
already is does nothing. A build that is killed leaves a .staging- folder, which the next build
there removes.
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1hpc.base.cli import ArgumentParser, print_json, run_command
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
    return {"build": _build, "verify": _verify, "inspect": _inspect, "trace": _trace}[argv[0]](arguments)


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(prog="python -m r1hpc.shard", description=__doc__, epilog=_EXAMPLES)
    subcommands = parser.add_subparsers(
        dest="subcommand", required=True, metavar="build|verify|inspect|trace"
    )
    build = subcommands.add_parser("build", help="make a dataset from a recipe")
    build.add_argument("recipe", metavar="RECIPE", help="recipe file, or its name in shards/")
    build.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the dataset will be")
    build.add_argument("--workers", metavar="N", type=int, default=1, help="writer processes (default 1)")
    verify = subcommands.add_parser("verify", help="audit every byte; exit status 1 names each bad file")
    inspect = subcommands.add_parser("inspect", help="what a dataset holds")
    trace = subcommands.add_parser("trace", help="which documents one training sample was made of")
    trace.add_argument("--seq-len", type=int, help="data.seq_len of the run; not needed for traces")
    trace.add_argument("--seed", type=int, default=0, help="data.seed of the run (default 0)")
    trace.add_argument("--sample", type=int, required=True, help="sample id, counted over all epochs")
    for subcommand in (verify, inspect, trace):
        subcommand.add_argument("dir", metavar="DIR", type=Path)
    inspect.add_argument("--doc", metavar="N", type=int, help="also print document N, decoded")
    for subcommand in (build, verify, inspect, trace):
        subcommand.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser, {"build": build, "verify": verify, "inspect": inspect, "trace": trace}


def _build(arguments: Namespace) -> int:
    from r1hpc.data.build import build_dataset
    from r1hpc.data.recipe import find_recipe

    began = time.monotonic()
    report = build_dataset(find_recipe(arguments.recipe), arguments.out, workers=arguments.workers)
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
    from r1hpc.data.describe import trace_sample

    found, documents = trace_sample(arguments.dir, arguments.sample, arguments.seq_len, arguments.seed)
    if arguments.json:
        print_json(found | {"documents": [asdict(info) for info in documents]})
        return 0
    place = f"tokens {found['token_start']} to {found['token_stop'] - 1}"
    print(f"sample {arguments.sample}: {place} of {arguments.dir.absolute()}")
    for info in documents:
        place = f"{printable(info.path)} at {info.position}"
        print(f"  document {info.number}: {info.source}, {place}")
        print(f"    licence: {printable(info.license)}")
    return 0


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
