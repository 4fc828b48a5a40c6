"""Print for `shard`: a plan, a build, what was kept, a dataset, and the origin of a document."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1hpc.base.names import printable
from r1hpc.base.units import format_bytes, format_duration


def print_plan(found: dict[str, Any]) -> None:
    for source in found["sources"]:
        size = format_bytes(source["bytes"])
        print(f"source {source['name']}: {source['files']:,} files of {source['kind']}, {size}")
    for stage, count in found["stages"].items():
        print(f"stage {stage}: {count:,} {'unit' if count == 1 else 'units'}")


def print_progress(folder: Path, found: dict[str, Any]) -> None:
    state = {
        "done": f"done, dataset {found.get('id', '')[:12]}",
        "building": "being built",
        "stopped": "stopped: build again to go on",
        "none": "no build and no dataset there",
    }[found["state"]]
    print(f"{folder}: {state}")
    for stage in found["stages"]:
        rate = f", {format_bytes(stage['bytes_per_second'])}/s" if stage["bytes_per_second"] else ""
        left = f", about {format_duration(stage['left_s'])} left" if stage["left_s"] else ""
        memory = stage["peak_memory_bytes"]
        held = f", at most {format_bytes(memory)} a process" if memory else ""
        print(f"  {stage['stage']}: {stage['done']} of {stage['units']}{rate}{left}{held}")
    cpu_s = sum(stage["cpu_s"] for stage in found["stages"])
    if cpu_s:
        print(f"  {cpu_s / 3600:.2f} CPU-hours so far")


def print_audit(found: dict[str, Any]) -> None:
    for source in found["sources"]:
        documents = source["documents"]
        print(f"{source['name']}: {documents['kept']:,} of {documents['in']:,} records kept")
        for rule, count in sorted(documents["dropped"].items(), key=lambda item: -item[1]):
            print(f"  {count:>10,} {rule}")
        share = f", {found['mix'][source['name']]:.1%} of the mixture" if "mix" in found else ""
        print(f"  {found['tokens'][source['name']]:>10,} tokens{share}")


def print_document(document: dict[str, Any]) -> None:
    """Print where a document comes from, and what was decided about it."""
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


def print_description(described: dict[str, Any]) -> None:
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
            why = "no traces" if "roles" in described else "empty, or not UTF-8"
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
        print(f"  xxh3-128 {document['xxh3_128']}")
        print()
        for role in ("prompt", "completion") if "prompt" in document else ():
            print(f"  {role}: {printable(document[role])}")
        if "prompt" not in document:
            print(printable(document["text"]))


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yield a function to call with each further number of bytes."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    # Deferred: only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)
