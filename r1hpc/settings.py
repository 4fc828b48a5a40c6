"""Show the settings a run would get, and where each value comes from.

    python -m r1hpc.settings jobs/train.yaml                     # every key, its value and its source
    python -m r1hpc.settings jobs/train.yaml train.lr=1e-4 --set  # what differs from the defaults
    python -m r1hpc.settings CHAIN --set                         # of each stage; or one: CHAIN/STAGE
    python -m r1hpc.settings RUN_A RUN_B                         # side by side: only what differs
    python -m r1hpc.settings --reference                         # every setting with its meaning, as Markdown

Later wins: a job file's includes, its own keys, the cluster profile, KEY=VALUE.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from r1hpc.base.choose_run import choose_run
from r1hpc.base.cli import (
    ArgumentParser,
    add_cluster,
    add_job_words,
    add_json,
    add_run_root,
    file_and_overrides,
    print_result,
    run_command,
)
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.run_dir import CHAIN, places_of
from r1hpc.base.tables import format_table, terminal_width

# Loaded only when they are needed: --help must be quick.
if TYPE_CHECKING:
    from r1hpc.config.origins import Setting

_SHORTEST_VALUE, _LONGEST_VALUE, _LONGEST_COMPARED = 8, 48, 300


def main(argv: Sequence[str]) -> int:
    """Print the settings and return the exit status."""
    parser = ArgumentParser(prog="python -m r1hpc.settings", description=__doc__)
    add_job_words(parser, "JOB.yaml | CHAIN | KEY=VALUE", "job file, or run or chain; overrides")
    parser.add_argument("--set", action="store_true", help="only keys that some file or override sets")
    parser.add_argument("--reference", action="store_true", help="docs/settings.md, from the schema")
    parser.add_argument("--schema", action="store_true", help="jobs/schema.json: JSON Schema of job files")
    add_cluster(parser)
    add_run_root(parser)
    add_json(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.reference or arguments.schema:
        from r1hpc.config.reference import reference, schema_text

        print(reference() if arguments.reference else schema_text(), end="")
        return 0
    if len(both := [word for word in arguments.words if "=" not in word]) == 2:
        return _compare(both, arguments)
    file, overrides = file_and_overrides(arguments.words)
    stages = _frozen(file, arguments.run_root) if file else {}
    if stages and overrides:
        raise UsageError(f"{printable(str(file))} has been submitted: leave out {printable(overrides[0])}")
    if not stages:
        from r1hpc.config.origins import resolved

        stages = {"": resolved(file, overrides, arguments.cluster)}
    if arguments.set:
        stages = {name: [each for each in found if each.is_set] for name, found in stages.items()}
    shown = {
        name: {each.key: {"value": each.value, "source": each.source} for each in found}
        for name, found in stages.items()
    }
    text = "\n\n".join(f"{name}\n{_table(found)}".lstrip("\n") for name, found in stages.items())
    print_result(shown.get("", shown), text, arguments.json)
    return 0


def _frozen(given: str, run_root: str | None) -> "dict[str, list[Setting]]":
    """Return the settings of each stage of a chain, or of a run under ""; empty if `given` is neither."""
    from r1hpc.config.load import read
    from r1hpc.config.origins import frozen
    from r1hpc.submission.chain.file import open_definition
    from r1hpc.submission.chain.folder import ChainDir

    chain = ChainDir.find(given, run_root)
    if chain is not None:  # a stage that was submitted may have been given other settings since
        stages = [(each, chain.stage(each.name).config) for each in open_definition(chain).stages]
        return {
            each.name: frozen(read(path), path.name) if path.is_file() else frozen(each.config, CHAIN)
            for each, path in stages
        }
    if any((place / "config.yaml").is_file() for place in places_of(given, run_root)):
        config = choose_run(given, run_root).config
        return {"": frozen(read(config), config.name)}
    return {}


def _compare(names: Sequence[str], arguments: Any) -> int:
    """Print the settings that differ between two runs or job files."""
    from r1hpc.config.origins import resolved

    if len(names) < len(arguments.words):
        raise UsageError("two runs are compared as they are: leave out KEY=VALUE")
    columns = []
    for name in names:
        stages = _frozen(name, arguments.run_root) or {"": resolved(name, (), arguments.cluster)}
        if list(stages) != [""]:
            raise UsageError(f"{printable(name)} is a chain. Name a stage: {name}/{next(iter(stages))}")
        columns.append({each.key: each.value for each in stages[""]})
    a, b = columns
    found = {key: [a[key], b[key]] for key in a if a[key] != b[key]}
    rows = [(key, *(_short(value, _LONGEST_COMPARED) for value in values)) for key, values in found.items()]
    table = format_table(("setting", *names), rows) if rows else f"all {len(a)} settings are equal"
    print_result({"runs": names, "settings": found}, table, arguments.json)
    return 0


def _table(settings: "Sequence[Setting]") -> str:
    key_width = max((len(each.key) for each in settings), default=0)
    room = terminal_width() - key_width - 4
    sources = [_end(each.source, room - _SHORTEST_VALUE) for each in settings]
    most = min(_LONGEST_VALUE, max(_SHORTEST_VALUE, room - max(map(len, sources), default=0)))
    values = [_short(each.value, most) for each in settings]
    value_width = max(map(len, values), default=0)
    return "\n".join(
        f"{each.key:{key_width}}  {value:{value_width}}  {source}"
        for each, value, source in zip(settings, values, sources, strict=True)
    )


def _end(path: str, most: int) -> str:
    """Cut a path on the left: its end is the file's name."""
    return path if len(path) <= most else f"…{path[1 - most :]}"


def _short(value: Any, most: int) -> str:
    names = {None: "null", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else printable(str(value))
    return text if len(text) <= most else text[: most - 1] + "…"


if __name__ == "__main__":
    run_command(main)
