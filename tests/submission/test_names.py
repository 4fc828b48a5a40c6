"""Names of runs and run roots that would block a later command are refused."""

from pathlib import Path

import pytest

from r1hpc.base.errors import UsageError
from r1hpc.submission.order import Order


@pytest.mark.parametrize("name", ["report.html", "budget.yaml", "report-1a2b3c4d.html"])
def test_names_of_files_of_the_run_root_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="ends like a file of the run root"):
        Order(run_root=tmp_path, run_name=name).new_run()
    (tmp_path / name).mkdir()  # an earlier version's run goes on
    assert Order(run_root=tmp_path, run_name=name).resumed_run().run_id == name


def test_a_run_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file: name a folder"):
        Order(run_root=tmp_path / "file", run_name="a").new_run()


def test_a_long_name_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        Order(run_root=tmp_path, run_name="x" * 5000).new_run()
    assert len(str(raised.value)) < 300
