"""Every test marked gpu, by pytest; without a card they are skipped, which the table says."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.place import CHECKOUT, PieceError, Place
from benchmarks.gpu.table import Table


def run(place: Place) -> list[Table]:
    report = place.folder / "tests.xml"
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--no-header",
        f"--junitxml={report}",
        *_files(),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if place.is_small else dict(os.environ)
    done = subprocess.run(argv, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    rows = _rows(report)
    table = Table("Tests marked gpu", ("test", "outcome", "why"), rows)
    if done.returncode != 0 or not rows:
        raise PieceError(f"pytest exited {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-500:]}")
    return [table]


def _files() -> list[str]:
    """Those that hold such tests: to collect all others takes longer than these run."""
    found = sorted((CHECKOUT / "tests").rglob("test_*.py"))
    return [str(path) for path in found if "pytest.mark.gpu" in path.read_text()]


def _rows(report: Path) -> tuple[tuple[str, str, str], ...]:
    if not report.is_file():
        return ()
    return tuple(_row(case) for case in ElementTree.parse(report).iter("testcase"))


def _row(case: ElementTree.Element) -> tuple[str, str, str]:
    name = f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"
    for outcome in ("failure", "error", "skipped"):
        found = case.find(outcome)
        if found is not None:
            return name, outcome, (found.get("message") or "").splitlines()[0][:120]
    return name, "passed", ""
