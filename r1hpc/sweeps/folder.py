"""Lay out the folder of a sweep: a run folder per point, and what the points share.

<run_root>/<sweep>/
    sweep.json          the job, the varied settings and all points
    shared/             the frozen code, which each point links to
    rungs/              which points were stopped early, see telemetry.records.rungs
    <point>/            an ordinary run folder
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.files import read_json, write_json
from r1hpc.base.run_dir import SWEEP, RunDir
from r1hpc.submission.chain.folder import ChainDir
from r1hpc.sweeps.grid import Grid, Point, points_of
from r1hpc.telemetry.records.rungs import Halving


@dataclass(frozen=True)
class Definition:
    """A sweep as frozen in its folder."""

    source: str
    """The job file."""
    layers: list[dict[str, Any]]
    """Its contents, the later wins."""
    overrides: list[str]
    """For every point."""
    cluster: str | None
    grids: list[Grid]
    """One for each call that added points."""
    rungs: Halving | None = None
    """None: every point runs to its end."""

    def points(self) -> list[Point]:
        """Return all points, in the order in which they were added."""
        found = {point.name: point for grid in self.grids for point in points_of(grid)}
        return list(found.values())


class SweepDir(ChainDir):
    """Paths of one sweep, with the lock and the supervisor's log of a chain."""

    @property
    def definition(self) -> Path:
        return self.path / SWEEP

    @property
    def shared(self) -> RunDir:
        return RunDir(self.path / "shared")

    def save(self, definition: Definition) -> None:
        write_json(self.definition, asdict(definition))

    def read(self) -> Definition:
        """Return what `save` wrote."""
        return Definition(**read_json(self.definition, Definition))
