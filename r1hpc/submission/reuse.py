"""Let a new chain begin with finished stages of an earlier one.

A reused stage is a link in the chain's folder: it is finished, so nothing runs, and the stages after it read
what it left.
"""

from collections.abc import Mapping
from pathlib import Path

from r1hpc.base.errors import UsageError
from r1hpc.base.names import nearest, printable
from r1hpc.base.run_dir import RunDir, open_run
from r1hpc.config import load
from r1hpc.submission.chain.file import Definition, stages_before
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.submission.order import Order
from r1hpc.submission.resume import OF_THE_PLACE, flat


def find_reused(definition: Definition, order: Order) -> dict[str, RunDir]:
    """Return the finished runs that take the place of stages, by stage.

    Raises:
        UsageError: no such chain or stage, or it is not finished.
    """
    found: dict[str, RunDir] = {}
    if order.from_stage is not None:
        name, chain = _named(order.from_stage, Path(definition.source).stem, definition, order)
        again = [each for each in definition.names if name in (each, *stages_before(each, definition.needs))]
        kept = [each for each in definition.names if each not in again]
        found |= {each: chain.stage(each) for each in kept if chain.stage(each).finished.exists()}
        missing = [each for each in stages_before(name, definition.needs) if each not in found]
        if missing:
            raise UsageError(
                f"--from {name}: {chain.name} has not finished {missing[0]}, which comes before it"
            )
    for item in order.reuse:
        if ":" not in item:
            raise UsageError(f"--reuse {printable(item)}: write CHAIN:STAGE")
        name, chain = _named(item, "", definition, order)
        found[name] = chain.stage(name)
        if not found[name].finished.exists():
            raise UsageError(f"--reuse {printable(item)}: it has not finished, so there is nothing to reuse")
    return {name: open_run(run.path.resolve()) for name, run in found.items()}


def _named(given: str, usual: str, definition: Definition, order: Order) -> tuple[str, ChainDir]:
    chain_name, _, stage = given.rpartition(":")
    if stage not in definition.names:
        known = ", ".join(definition.names)
        raise UsageError(
            f"there is no stage {printable(stage)!r}{nearest(stage, definition.names)}; there are: {known}"
        )
    chain = ChainDir.find(chain_name or usual, order.run_root)
    if chain is None:
        raise UsageError(
            f"there is no chain {printable(chain_name or usual)} under {order.run_root.absolute()}: name one "
            f"as CHAIN:{stage}"
        )
    return stage, chain


def notes_on(reused: Mapping[str, RunDir], definition: Definition, chain: ChainDir) -> list[str]:
    """Return a sentence on each reused stage, with the settings that the file has otherwise."""
    notes = []
    for name, run in reused.items():
        before, other = flat(load.read(run.config)), run.path.parent
        changed = [
            key
            for key, value in sorted(flat(definition.stage(name).config).items())
            if not key.startswith(OF_THE_PLACE)
            and value not in (None, before.get(key))  # None: derived at submission
            and str(before.get(key)).replace(f"{other}/", f"{chain.path}/") != str(value)
        ]
        differs = f", which ran with another {', '.join(changed)}" if changed else ""
        notes.append(f"stage {name} is that of {other.name}{differs}")
    return notes


def link(chain: ChainDir, reused: Mapping[str, RunDir]) -> None:
    """Put the reused stages into the folder of the chain."""
    for name, run in reused.items():
        chain.stage(name).path.symlink_to(run.path)
