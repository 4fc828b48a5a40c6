"""The job script acts by what the run's frozen code means, which may be older than the script."""

from pathlib import Path

import pytest

import r1hpc
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig
from r1hpc.slurm.script import make_script, render, site_file
from r1hpc.slurm.shell import contract

PACKAGE = Path(r1hpc.__file__).parent
HERE = Path(contract.__file__).relative_to(PACKAGE)
"""Where this version keeps the contract."""


def frozen(folder: Path, text: str | None, place: Path = HERE) -> RunDir:
    run = RunDir(folder / "demo")
    file = run.code / "r1hpc" / place
    file.parent.mkdir(parents=True)
    if text is not None:
        file.write_text(text)
    return run


@pytest.mark.parametrize(
    ("text", "place", "number"),
    [
        (None, HERE, 1),
        ("CURRENT = 4\n", Path("slurm/contract.py"), 4),
        (Path(contract.__file__).read_text(), HERE, contract.CURRENT),
    ],
    ids=["0.1.0", "an earlier version", "this version"],
)
def test_the_script_says_what_the_frozen_code_means(
    tmp_path: Path, text: str | None, place: Path, number: int
) -> None:
    script = make_script(frozen(tmp_path, text, place), RunConfig())
    assert f"\nCONTRACT={number} #" in render(script)
    assert f"CONTRACT={number}\n" in site_file(script)


def test_a_run_that_has_no_code_yet_gets_this_versions(tmp_path: Path) -> None:
    assert contract.of_frozen(RunDir(tmp_path / "new").code) == contract.CURRENT


def test_code_that_is_newer_than_the_script_is_refused(tmp_path: Path) -> None:
    run = frozen(tmp_path, f"CURRENT = {contract.CURRENT + 1}\n")
    with pytest.raises(UsageError, match="is newer than this r1hpc: resume the run with"):
        make_script(run, RunConfig())
