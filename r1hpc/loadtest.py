"""Measure a server's throughput and latency, or compare two servers.

    python -m r1hpc.loadtest SERVER                    # one that r1hpc.serve started
    python -m r1hpc.loadtest SERVER OTHER              # the same load on both: which one is faster?
    python -m r1hpc.loadtest URL --key-file FILE       # through a tunnel, or another OpenAI server
    python -m r1hpc.loadtest SERVER --prompts FILE.jsonl --max-tokens 512

1, 2, 4 ... clients each ask again as soon as they have an answer, until throughput stops growing. Each level
reports requests/s, tokens/s, the time to the first token, the latency of whole answers, and failures. Exit
status 1: a request failed. See docs/serving.md.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import RUN_NAMES, choose_run, full_name
from r1hpc.base.cli import ArgumentParser, add_json, add_run_root, offer, print_result, run_command
from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.files import parse_object, write_json
from r1hpc.base.names import printable

if TYPE_CHECKING:
    from r1hpc.serving.loadtest import Level, Target

_TABLE_WIDTH = 200
_HEADINGS = (
    *("server", "clients", "requests/s", "tokens/s"),
    *("first token p50", "p95", "latency p50", "p95", "failed"),
)


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    os.umask(0o077)
    from r1hpc.serving.address import address_now, read_key
    from r1hpc.serving.loadtest import Prompts, Target, ask, measure

    prompts = Prompts(arguments.prompt_tokens, arguments.max_tokens, _prompts_of(arguments.prompts))
    what = f"{arguments.prompt_tokens} random words" if arguments.prompts is None else str(arguments.prompts)
    about = {"prompts": what, "max_tokens": arguments.max_tokens}
    results: list[dict[str, Any]] = []
    for server in arguments.servers:
        run = None if "://" in server else choose_run(server, arguments.run_root)
        if run is None:
            target = _target_of_url(server, arguments)
        else:
            address = address_now(run)
            target = Target(full_name(run), address.place.url, address.model, read_key(run))
            target.check()
        first = ask(target, *prompts.next())
        if first.failure:
            detail = f": {first.detail}" if first.detail else ""
            raise StateError(f"{target.url} does not answer a request ({first.failure}){detail}")
        levels: list[Level] = []
        result = {"name": target.name, "url": target.url, "model": target.model, "levels": levels}
        results.append(result)
        for level in measure(target, prompts, arguments.levels, arguments.seconds):
            levels.append(level)
            print(f"{level['clients']} clients: {level['requests_per_s']:.3g}/s", file=sys.stderr, flush=True)
        if run is not None:
            run.loadtests.mkdir(mode=0o700, exist_ok=True)
            path = run.loadtests / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"
            write_json(path, {**about, "servers": [result]})
            print(path, file=sys.stderr)
    print_result({**about, "servers": results}, "\n".join(_lines(results)), arguments.json)
    return 1 if any(level["failed"] for result in results for level in result["levels"]) else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.loadtest", description=__doc__)
    servers = parser.add_argument(
        "servers", nargs="+", metavar="RUN|URL", help="a server that r1hpc.serve started, or its URL; or two"
    )
    offer(servers, RUN_NAMES)
    parser.add_argument(
        "--levels", metavar="N,N,...", type=_counts, default=(), help="clients; default 1,2,4 ..."
    )
    parser.add_argument("--seconds", metavar="S", type=float, default=30.0, help="of a level (30)")
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, default=128, help="words of a made-up prompt (128)"
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, default=64, help="of an answer (64)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="lines with `prompt` or `messages`, in turn"
    )
    parser.add_argument("--model", metavar="NAME", help="of a URL: which of its models; default the first")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="of a URL: the file with its key")
    parser.add_argument(
        "--unproven", action="store_true", help="of a URL: give the key to a server that is not r1hpc's"
    )
    add_json(parser)
    add_run_root(parser)
    return parser


def _counts(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in given.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r}: give whole numbers, as in 1,4,16") from None


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that cannot form a test, and flags that would be ignored."""
    from r1hpc.serving.loadtest import MOST_CLIENTS

    for flag, value, low, high in (
        ("--seconds", arguments.seconds, 1, 86_400),
        ("--prompt-tokens", arguments.prompt_tokens, 1, 1 << 20),
        ("--max-tokens", arguments.max_tokens, 1, 1 << 20),
        *(("--levels", each, 1, MOST_CLIENTS) for each in arguments.levels),
    ):
        if not low <= value <= high:
            raise UsageError(f"{flag} {value:g}: give {low} to {high}")
    if len(arguments.servers) > 2:
        raise UsageError(f"{len(arguments.servers)} servers: give one, or two to compare")
    of_url = {"--key-file": arguments.key_file, "--model": arguments.model, "--unproven": arguments.unproven}
    given = [flag for flag, value in of_url.items() if value]
    if given and not any("://" in server for server in arguments.servers):
        raise UsageError(f"{given[0]} is of a URL: the key and model of r1hpc's own servers are known")
    if arguments.unproven and arguments.key_file is None:
        raise UsageError("--unproven gives a server the key of --key-file FILE: name it")


def _prompts_of(path: Path | None) -> list[Mapping[str, Any]]:
    if path is None:
        return []
    found: list[Mapping[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"--prompts {path}: not UTF-8") from None
    except OSError as error:
        raise UsageError(f"--prompts {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_object(line.encode()) or {}
        kept = {name: value for name, value in row.items() if name in ("messages", "prompt")}
        if len(kept) != 1:
            raise UsageError(
                f'--prompts {path}, line {number}: wants an object with either "prompt" or "messages"'
            )
        found.append(kept)
    if not found:
        raise UsageError(f"--prompts {path}: there is no line in it")
    return found


def _target_of_url(given: str, arguments: argparse.Namespace) -> "Target":
    from r1hpc.serving.loadtest import Target

    url = _url(given)
    target = Target(url, url, arguments.model or "", _key(arguments.key_file), not arguments.unproven)
    target.check()
    return target if target.model else replace(target, model=_first_model(url, target.key))


def _url(given: str) -> str:
    from urllib.parse import urlsplit

    wrong = UsageError(f"{printable(given)}: give http://HOST:PORT, without the /v1 and without a user")
    try:
        parts = urlsplit(given)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise wrong from None
    if not right or parts.username or parts.query or parts.fragment or any(map(str.isspace, given)):
        raise wrong
    return given.rstrip("/").removesuffix("/v1")


def _key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise UsageError(f"--key-file {path}: {error.strerror}") from None
    if not key or not key.isascii() or any(byte <= 32 or byte == 127 for byte in key):
        raise UsageError(f"--key-file {path}: one line of letters and digits is a key, and this is none")
    return key.decode()


def _first_model(url: str, key: str | None) -> str:
    from r1hpc.serving.client import Client

    status, body = Client(url).read("/v1/models", key)
    if status in (401, 403):
        advice = ": name its file, --key-file FILE" if key is None else ", and not this one"
        raise StateError(f"{url} wants a key (HTTP {status}){advice}")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise StateError(
            f"{url}/v1/models names no model (HTTP {status}): give its name, --model NAME"
        ) from None


def _lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    from r1hpc.base.tables import format_table

    rows, failures = [], []
    for result in results:
        for level in result["levels"]:
            rows.append(_row(result["name"], level))
            title = f"{result['name']}, {level['clients']} clients"
            failures += [f"{title}: {count} x {kind}" for kind, count in level["failed"].items()]
    table = format_table(_HEADINGS, rows, right=range(1, len(_HEADINGS)), width=_TABLE_WIDTH)
    return [table, "times in ms", *failures, *(_compared(*results) if len(results) == 2 else [])]


def _row(name: str, level: "Level") -> tuple[str, ...]:
    times = (*level["ttft_s"].values(), *level["latency_s"].values())
    return (
        name,
        str(level["clients"]),
        f"{level['requests_per_s']:.2f}",
        f"{level['tokens_per_s']:.1f}",
        *("-" if value is None else f"{1000 * value:.0f}" for value in times),
        str(sum(level["failed"].values())),
    )


def _compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Compare two servers under the largest load that both had."""
    pairs = [(one, other) for one in a["levels"] for other in b["levels"]]
    pairs = [pair for pair in pairs if pair[0]["clients"] == pair[1]["clients"]]
    if not pairs:
        return []
    one, other = max(pairs, key=lambda pair: pair[0]["clients"])
    if not (one["finished"] and other["finished"]):
        return []
    rate = other["requests_per_s"] / one["requests_per_s"]
    p50, p95 = (other["latency_s"][p] / one["latency_s"][p] for p in ("p50", "p95"))
    return [
        f"{b['name']} beside {a['name']} with {one['clients']} clients: {rate:.2f} x the requests/s, "
        f"{p50:.2f} x the p50 latency, {p95:.2f} x the p95 latency"
    ]


if __name__ == "__main__":
    run_command(main)
