"""Load a server up to its limit, and measure throughput and latency.

    python -m r1hpc.loadtest SERVER                    # one that r1hpc.serve started
    python -m r1hpc.loadtest SERVER --soak 30          # plus half an hour at 0.7 of its limit: its memory
    python -m r1hpc.loadtest URL --key-file FILE       # through a tunnel, or another OpenAI server
    python -m r1hpc.loadtest SERVER --prompts FILE.jsonl --max-tokens 512

First a closed loop (1, 2, 4 ... clients, until throughput stops growing), then an open loop (requests at a
fixed rate, answered or not) around that rate. Each level reports the rates, the time to the first token and
between tokens (p50, p95, p99), and failures, as a table and JSON. Every level ends after its --seconds and
--drain, whatever the server does. Exit status 1: requests failed at a load within the server's limit. See
docs/serving.md.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import RUN_NAMES, choose_run, full_name
from r1hpc.base.cli import ArgumentParser, add_run_root, offer, print_json, run_command
from r1hpc.base.errors import R1hpcError, StateError, UsageError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import RunDir

if TYPE_CHECKING:
    from r1hpc.serving.loadtest.load import LoadTest, Prompts
    from r1hpc.serving.loadtest.report import About, LoadReport
    from r1hpc.serving.loadtest.stream import Target

_FIRST_ANSWER_S = 60.0
_MOST_S = 7 * 24 * 3600.0
_MOST_TOKENS = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    os.umask(0o077)
    given = _prompts_of(arguments.prompts) if arguments.prompts is not None else []
    run, url, model, key = _server(arguments)
    target = _target(arguments, run, url, model, key)
    prompts = _prompts(arguments, target, given)
    folder = _folder(arguments, run)
    _try_once(target, prompts, max(_FIRST_ANSWER_S, arguments.seconds + arguments.drain))
    return _measure(arguments, run, target, prompts, folder)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.loadtest", description=__doc__)
    server = parser.add_argument(
        "server", metavar="RUN|URL", help="a server that r1hpc.serve started, or its URL"
    )
    offer(server, RUN_NAMES)
    parser.add_argument(
        "--levels", metavar="N,N,...", type=_counts, default=(), help="clients; default 1,2,4 ..."
    )
    parser.add_argument(
        "--rates",
        metavar="X,X,...",
        type=_fractions,
        default=(0.5, 0.8, 1.0, 1.2),
        help="of the open loop, as parts of the saturation rate (0.5,0.8,1.0,1.2); none: no open loop",
    )
    parser.add_argument("--seconds", metavar="S", type=float, default=30.0, help="of a level (30)")
    parser.add_argument(
        "--drain", metavar="S", type=float, default=30.0, help="for answers under way at its end (30)"
    )
    parser.add_argument("--soak", metavar="MIN", type=float, default=0.0, help="so long at 0.7 of saturation")
    parser.add_argument(
        "--prompt-tokens", metavar="N", type=int, default=128, help="of made-up prompts (128)"
    )
    parser.add_argument("--max-tokens", metavar="N", type=int, default=64, help="of an answer (64)")
    parser.add_argument("--may-stop", action="store_true", help="answers end where the model ends them")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="lines with `prompt` or `messages`, in turn"
    )
    parser.add_argument("--chat", action="store_true", help="made-up prompts as chat")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of arrivals (0); made-up prompts never come again"
    )
    parser.add_argument("--model", metavar="NAME", help="of a URL: which of its models; default the first")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="of a URL: the file with its key")
    parser.add_argument(
        "--unproven", action="store_true", help="of a URL: give the key to a server that is not r1hpc's"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the results go; default RUN/loadtest, of a URL ./loadtest",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_run_root(parser)
    return parser


def _counts(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in given.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r}: give whole numbers, as in 1,4,16") from None


def _fractions(given: str) -> tuple[float, ...]:
    if given == "none":
        return ()
    try:
        return tuple(float(each) for each in given.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r}: give numbers, as in 0.5,1.0, or none") from None


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that cannot form a test."""
    from r1hpc.serving.loadtest.load import MOST_CLIENTS

    for flag, value, low, high in (
        ("--seconds", arguments.seconds, 1, _MOST_S),
        ("--drain", arguments.drain, 0, _MOST_S),
        ("--soak", arguments.soak * 60, 0, _MOST_S),
        ("--prompt-tokens", arguments.prompt_tokens, 1, _MOST_TOKENS),
        ("--max-tokens", arguments.max_tokens, 1, _MOST_TOKENS),
        *(("--levels", each, 1, MOST_CLIENTS) for each in arguments.levels),
        *(("--rates", each, 0.01, 10) for each in arguments.rates),
    ):
        if not (math.isfinite(value) and low <= value <= high):
            shown, low, high = (x / 60 if flag == "--soak" else x for x in (value, low, high))
            raise UsageError(f"{flag} {shown:g}: give {low:g} to {high:g}")
    if arguments.prompts is not None and arguments.chat:
        raise UsageError("--chat is of made-up prompts: lines of --prompts with `messages` are chat anyway")
    if not _is_url(arguments.server):
        beside = {
            "--key-file": arguments.key_file,
            "--model": arguments.model,
            "--unproven": arguments.unproven,
        }
        for flag, value in beside.items():
            if value:
                raise UsageError(
                    f"{flag} is of a URL: a server that r1hpc started has its key and model recorded"
                )
    elif arguments.unproven and arguments.key_file is None:
        raise UsageError("--unproven gives a server the key of --key-file FILE: name it")


def _is_url(server: str) -> bool:
    return "://" in server


def _prompts_of(path: Path) -> list[Mapping[str, Any]]:
    """Return the lines of --prompts, each with the fields for one request."""
    import json

    found: list[Mapping[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"--prompts {path}: not UTF-8") from None
    except OSError as error:
        raise UsageError(f"--prompts {path}: {error.strerror}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            each = json.loads(line)
        except ValueError:
            each = None
        kept = (
            {name: each[name] for name in ("messages", "prompt") if name in each}
            if isinstance(each, dict)
            else {}
        )
        if len(kept) != 1:
            raise UsageError(
                f'--prompts {path}, line {number}: wants an object with either "prompt" or "messages"'
            )
        found.append(kept)
    if not found:
        raise UsageError(f"--prompts {path}: there is no line in it")
    return found


def _server(arguments: argparse.Namespace) -> tuple[RunDir | None, str, str | None, str | None]:
    """Return the server's run, URL, model and key, as far as known."""
    if not _is_url(arguments.server):
        run = choose_run(arguments.server, arguments.run_root)
        from r1hpc.serving.address import read_key
        from r1hpc.serving.await_server import address_now

        address = address_now(run)
        return run, address.place.url, address.model, read_key(run)
    return None, _url(arguments.server), arguments.model, _key(arguments.key_file)


def _url(given: str) -> str:
    from urllib.parse import urlsplit

    wrong = UsageError(f"{printable(given)}: give http://HOST:PORT, without the /v1 and without a user")
    try:
        parts = urlsplit(given)
        right = (
            parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
        )
    except ValueError:
        raise wrong from None
    if not right or parts.query or parts.fragment or any(each.isspace() for each in given):
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


def _target(
    arguments: argparse.Namespace, run: RunDir | None, url: str, model: str | None, key: str | None
) -> "Target":
    """Return the server to test, after it has proven that it has the key, if there is one."""
    from r1hpc.serving.client import Client
    from r1hpc.serving.loadtest.stream import Target

    client = Client(url)
    known = _proof(client, key, arguments.unproven)()
    if known is None:
        again = f": for its address now, python -m r1hpc.serve {run.path}" if run is not None else ""
        raise StateError(f"nobody answers at {url}{again}")
    if not known:
        other = "" if run is not None else "; one that is not r1hpc's is given it with --unproven"
        raise StateError(f"who answers at {url} does not have this key and did not get it{other}")
    return Target(url, model or _first_model(client, key), key)


def _proof(client: Any, key: str | None, unproven: bool) -> Any:
    """Return the check made before each level: whether the server may get the key."""

    def is_there() -> bool | None:
        if key is not None and not unproven:
            known: bool | None = client.is_ours(key)
            return known
        return None if client.ask("/health", None) is None else True

    return is_there


def _first_model(client: Any, key: str | None) -> str:
    import json

    status, said = client.read("/v1/models", key)
    if status in (401, 403):
        raise StateError(
            f"{client.url} wants a key (HTTP {status})"
            + (": name its file, --key-file FILE" if key is None else ", and not this one")
        )
    try:
        return str(json.loads(said)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise StateError(
            f"{client.url}/v1/models names no model (HTTP {status}): give its name, --model NAME"
        ) from None


def _prompts(
    arguments: argparse.Namespace, target: "Target", given: Sequence[Mapping[str, Any]]
) -> "Prompts":
    """Return the prompts; made-up ones have --prompt-tokens tokens if the server can count them."""
    import json

    from r1hpc.serving.client import Client
    from r1hpc.serving.loadtest.load import Prompts

    made = {"max_tokens": arguments.max_tokens, "is_chat": arguments.chat, "may_stop": arguments.may_stop}
    prompts = Prompts(arguments.prompt_tokens, given=given, **made)
    if given:
        return prompts
    asked = {"model": target.model, "prompt": prompts.words()}
    _, said = Client(target.url).read("/tokenize", target.key, asked)
    try:
        per_word = json.loads(said)["count"] / arguments.prompt_tokens
    except (ValueError, LookupError, TypeError):
        return prompts
    prompts.num_words = max(1, round(arguments.prompt_tokens / max(per_word, 0.1)))
    return prompts


def _try_once(target: "Target", prompts: "Prompts", most_s: float) -> None:
    """Send one request, so that an error common to all is reported once."""
    import asyncio

    from r1hpc.serving.loadtest.load import ask_once

    answer = asyncio.run(ask_once(target, prompts, most_s))
    if answer is None:
        raise StateError(
            f"{target.url} has not finished one request within {most_s:.0f} s: if its answers take so long, "
            "give a longer --drain or fewer --max-tokens"
        )
    if answer.failure:
        said = f": {answer.detail}" if answer.detail else ""
        raise StateError(f"{target.url} does not answer a request ({answer.failure}){said}")


def _measure(
    arguments: argparse.Namespace, run: RunDir | None, target: "Target", prompts: "Prompts", folder: Path
) -> int:
    from r1hpc.serving.client import Client
    from r1hpc.serving.loadtest.load import LoadTest, Plan
    from r1hpc.serving.loadtest.report import LoadReport, memory_source, watching

    _allow_connections()
    client = Client(target.url)
    source = memory_source(client, target.key)
    plan = Plan(
        arguments.seconds,
        arguments.drain,
        arguments.levels,
        arguments.rates,
        arguments.soak * 60,
        arguments.seed,
    )
    test = LoadTest(
        target,
        _proof(client, target.key, arguments.unproven),
        prompts,
        plan,
        watch=lambda readings: watching(source, readings),
    )
    about = _about(arguments, run, target, prompts, source.words if source else "")
    interrupted = _run(test)
    report = LoadReport(about, test.levels, test.ended)
    _leave(report, folder, arguments.json)
    if interrupted:
        return 130
    if test.ended and not test.levels:
        raise R1hpcError(test.ended)
    return 0 if report.is_good else 1


def _run(test: "LoadTest") -> bool:
    """Run all levels and print a line for each; return True if interrupted."""
    from r1hpc.serving.loadtest.report import name_of

    try:
        for level in test.run():
            late = f", {level.failed} failed" * bool(level.failed)
            late += f", {level.unfinished} unfinished" * bool(level.unfinished)
            print(f"{name_of(level)}: {level.finished_per_s:.3g}/s{late}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        test.ended = "interrupted"
        return True
    return False


def _about(
    arguments: argparse.Namespace, run: RunDir | None, target: "Target", prompts: "Prompts", memory: str
) -> "About":
    from r1hpc.serving.loadtest.report import About

    if prompts.given:
        words = f"{len(prompts.given):,} prompts of {arguments.prompts.name}, in turn"
    else:
        words = f"made-up prompts of about {arguments.prompt_tokens} tokens"
    return About(
        name=full_name(run) if run is not None else target.url,
        url=target.url,
        model=target.model,
        begun=time.strftime("%Y-%m-%dT%H:%M:%S"),
        prompts=words,
        max_tokens=arguments.max_tokens,
        seconds=arguments.seconds,
        drain_s=arguments.drain,
        seed=arguments.seed,
        memory=memory,
    )


def _folder(arguments: argparse.Namespace, run: RunDir | None) -> Path:
    """Return the folder for the results, after checking that it can be written."""
    folder: Path = arguments.out or (run.loadtests if run is not None else Path("loadtest"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"the results cannot go to {folder} ({error.strerror}): give --out DIR") from None
    return folder


def _leave(report: "LoadReport", folder: Path, as_json: bool) -> None:
    """Print the report and write it as JSON."""
    from r1hpc.base.files import write_json

    if not report.levels:
        return
    path = folder / f"{report.about.begun.replace(':', '').replace('T', '-')}.json"
    content = report.as_json()
    if as_json:
        print_json({**content, "file": str(path)})
    else:
        print("\n".join(report.lines()), flush=True)
    write_json(path, content)
    print(path, file=sys.stderr if as_json else sys.stdout)


def _allow_connections() -> None:
    """Raise the limit of open files: an overloaded server has thousands of requests in flight."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    run_command(main)
