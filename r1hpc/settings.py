"""Show the settings a run would get, and where each value comes from.

    python -m r1hpc.settings jobs/train.yaml                     # every key, its value and its source
    python -m r1hpc.settings jobs/train.yaml train.lr=1e-4 --set # only what differs from the defaults
    python -m r1hpc.settings --reference                         # every setting with its meaning, as Markdown

Later wins: a job file's includes, its own keys, the cluster profile, KEY=VALUE.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from r1hpc.base.cli import ArgumentParser, add_cluster, file_and_overrides, offer, print_result, run_command
from r1hpc.base.names import printable
from r1hpc.base.tables import terminal_width

# omegaconf loads only when it is needed: --help must be quick.
if TYPE_CHECKING:
    from r1hpc.config.origins import Setting

_LONGEST_VALUE = 48


def main(argv: Sequence[str]) -> int:
    """Print the settings and return the exit status."""
    arguments = _parser().parse_intermixed_args(list(argv))
    if arguments.reference:
        from r1hpc.config.reference import reference

        print(reference(), end="")
        return 0
    if arguments.schema:
        from r1hpc.config.json_schema import as_text

        print(as_text(), end="")
        return 0
    from r1hpc.config.origins import DEFAULT

    settings = [each for each in _resolved(arguments) if not arguments.set or each.source != DEFAULT]
    shown = {each.key: {"value": each.value, "source": each.source} for each in settings}
    print_result(shown, _table(settings), arguments.json)
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.settings", description=__doc__)
    words = parser.add_argument(
        "words", nargs="*", metavar="JOB.yaml | KEY=VALUE", help="job file, dotted overrides"
    )
    offer(words, "r1hpc.config.assets:job_words")
    parser.add_argument("--set", action="store_true", help="only keys that some file or override sets")
    parser.add_argument("--reference", action="store_true", help="docs/settings.md, from the schema")
    parser.add_argument("--schema", action="store_true", help="jobs/schema.json: JSON Schema of job files")
    add_cluster(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _resolved(arguments: argparse.Namespace) -> "list[Setting]":
    from r1hpc.config.origins import resolved

    return resolved(*file_and_overrides(arguments.words), arguments.cluster)


def _table(settings: "Sequence[Setting]") -> str:
    """Return a line for each key; values are shortened to fit."""
    key_width, source_width = (
        max((len(text) for text in column), default=0)
        for column in ([each.key for each in settings], [each.source for each in settings])
    )
    most = min(_LONGEST_VALUE, max(8, terminal_width() - key_width - source_width - 4))
    rows = [(each.key, _short(each.value, most), each.source) for each in settings]
    value_width = max((len(value) for _, value, _ in rows), default=0)
    return "\n".join(f"{key:{key_width}}  {value:{value_width}}  {source}" for key, value, source in rows)


def _short(value: Any, most: int) -> str:
    """Return a value as YAML, shortened if long."""
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else printable(str(value))
    return text if len(text) <= most else text[: most - 1] + "…"


if __name__ == "__main__":
    run_command(main)
