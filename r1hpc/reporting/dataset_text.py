"""Describe for `shard`: a plan, a build, what was kept, a dataset, and the origin of a document."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1hpc.base.names import printable
from r1hpc.base.units import format_bytes, format_counts, format_duration


def plan_lines(found: dict[str, Any]) -> Iterator[str]:
    for source in found["sources"]:
        size = format_bytes(source["bytes"])
        yield f"source {source['name']}: {source['files']:,} files of {source['kind']}, {size}"
    for stage, count in found["stages"].items():
        yield f"stage {stage}: {count:,} {'unit' if count == 1 else 'units'}"


def progress_lines(folder: Path, found: dict[str, Any]) -> Iterator[str]:
    state = {
        "done": f"done, dataset {found.get('id', '')[:12]}",
        "building": "being built",
        "stopped": "stopped: build again to go on",
        "none": "no build and no dataset there",
    }[found["state"]]
    yield f"{folder}: {state}"
    for stage in found["stages"]:
        rate = f", {format_bytes(stage['bytes_per_second'])}/s" if stage["bytes_per_second"] else ""
        left = f", about {format_duration(stage['left_s'])} left" if stage["left_s"] else ""
        memory = stage["peak_memory_bytes"]
        held = f", at most {format_bytes(memory)} a process" if memory else ""
        yield f"  {stage['stage']}: {stage['done']} of {stage['units']}{rate}{left}{held}"
    cpu_s = sum(stage["cpu_s"] for stage in found["stages"])
    if cpu_s:
        yield f"  {cpu_s / 3600:.2f} CPU-hours so far"


def audit_lines(found: dict[str, Any]) -> Iterator[str]:
    for source in found["sources"]:
        documents = source["documents"]
        yield f"{source['name']}: {documents['kept']:,} of {documents['in']:,} records kept"
        for rule, count in sorted(documents["dropped"].items(), key=lambda item: -item[1]):
            yield f"  {count:>10,} {rule}"
        share = f", {found['mix'][source['name']]:.1%} of the mixture" if "mix" in found else ""
        yield f"  {found['tokens'][source['name']]:>10,} tokens{share}"


def count_lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield how many records were read, kept and dropped, over all and by source."""
    yield f"  records    {count_text(found['documents'])}"
    for source in found["sources"]:
        yield f"  source     {source['name']}: {count_text(source['documents'])}"


def count_text(documents: Mapping[str, Any]) -> str:
    """Return records in, kept and dropped, with the rules that dropped most first."""
    reasons = format_counts(documents["dropped"])
    lost = documents["in"] - documents["kept"]
    return f"{documents['in']:,} in, {documents['kept']:,} kept, {lost:,} dropped" + (
        f" ({reasons})" if reasons else ""
    )


def document_lines(document: dict[str, Any]) -> Iterator[str]:
    """Yield where a document comes from, and what was decided about it."""
    decided = document["decisions"] or {}
    size = f", {decided['size']:,} bytes" if decided.get("size") else ""
    place = f"{printable(document['path'])} at {document['position']}{size}"
    yield f"  document {document['number']}: {document['source']}, {place}"
    yield f"    licence: {printable(document['license'])}"
    edits = {name: decided.get(name) for name in ("repaired", "masked", "lines_removed")}
    said = [f"{name} {value}" for name, value in edits.items() if value]
    if decided.get("language"):
        said.insert(0, f"language {decided['language']} {decided['score']:.2f}")
    if decided:
        yield f"    decided: kept{''.join(f', {item}' for item in said)}"


def description_lines(described: dict[str, Any]) -> Iterator[str]:
    yield f"{described['name']}  {described['path']}"
    yield f"  id         {described['id']}"
    yield f"  tokens     {described['num_tokens']:,} in {described['num_documents']:,} documents"
    yield f"  vocabulary {described['vocab_size']:,} ({described['tokenizer']}, {described['dtype']})"
    yield f"  parts      {len(described['parts'])}, profile {described['profile']}"
    for source in described["sources"]:
        counts = f"{source['num_tokens']:,} tokens, {source['num_documents']:,} documents"
        yield f"  source     {source['name']}: {counts}"
        yield f"             licence: {printable(source['license'])}"
        if source["num_skipped"]:
            why = "no traces" if "roles" in described else "empty, or not UTF-8"
            yield f"             {source['num_skipped']:,} documents left out: {why}"
    if "roles" in described:
        roles = described["roles"]
        yield (
            f"  roles      {roles['prompt']:,} prompt tokens, {roles['completion']:,} of completions (learnt)"
        )
        yield f"  longest    {roles['longest_document']:,} tokens with its EOS; data.seq_len must hold it"
    if "document" in described:
        document = described["document"]
        yield f"  document {document['number']}: {printable(document['path'])} at {document['position']}"
        yield f"  xxh3-128 {document['xxh3_128']}"
        yield ""
        for role in ("prompt", "completion") if "prompt" in document else ():
            yield f"  {role}: {printable(document[role])}"
        if "prompt" not in document:
            yield printable(document["text"])


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
