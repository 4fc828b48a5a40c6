"""What a real sbatch refuses, and what a user is offered instead."""

import os
import re
from pathlib import Path

import pytest

from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.sbatch import sbatch, try_out, with_choices
from r1hpc.submit import main
from tests.cluster import Cluster


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("flags", "offered"),
    [
        (["--account=nobody"], r"your accounts: .*\(-A ACCOUNT\)"),
        (["--qos=gold"], r"your QOS: .*scavenger.*\(--qos QOS\)"),
        (["--partition=nowhere"], r"partitions here \(-p PARTITION\):\n  \w+: \d+ nodes of \d+ CPUs"),
        (["--nodes=900"], r"nodes of \d+ CPUs, \d+ MB, gpu:\S+, up to "),
        (["--constraint=quantum"], r"features of the nodes here: "),
    ],
    ids=["account", "qos", "partition", "nodes", "feature"],
)
def test_a_refusal_says_what_there_is(
    on_cluster: Cluster, tmp_path: Path, flags: list[str], offered: str
) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\ntrue\n")
    with pytest.raises(SlurmError) as refused:
        sbatch(script, tmp_path, flags)
    assert re.search(offered, str(refused.value)), str(refused.value)
    assert not refused.value.may_have_arrived
    trial = f"#!/bin/sh\n#SBATCH {flags[0]}\ntrue\n"
    # To a trial Slurm says the same as while nodes are down; `decide` counts the nodes.
    if flags == ["--nodes=900"]:
        assert try_out(trial).sentence.startswith(
            "Slurm refuses this, unless that is for nodes that are down"
        )
        return
    with pytest.raises(SlurmError) as tried:
        try_out(trial)
    assert re.search(offered, str(tried.value)), str(tried.value)


@pytest.mark.slurm
def test_a_trial_says_when_and_where_and_makes_no_job(
    on_cluster: Cluster,
) -> None:
    before = on_cluster.run(["squeue", "-h", "-t", "all", "-o", "%i"]).stdout
    said = try_out("#!/bin/sh\n#SBATCH --nodes=2 --time=5\ntrue\n").sentence
    assert re.fullmatch(r"as its queue stands, Slurm would start this at \d{4}-\S+T\S+ on \S+", said), said
    assert on_cluster.run(["squeue", "-h", "-t", "all", "-o", "%i"]).stdout == before


@pytest.mark.slurm
def test_a_dry_run_is_refused_as_the_submission_would_be(
    on_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["jobs/smoke.yaml", "--executor", "slurm", "--dry-run", "--run-root", str(tmp_path)]
    with pytest.raises(SlurmError, match=r"Invalid qos(.|\n)*your QOS: "):
        main([*wanted, "--qos", "gold"])
    assert main(wanted) == 0
    assert "as its queue stands, Slurm would start this at" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slurm
def test_what_only_a_drained_node_forbids_is_no_refusal(
    on_cluster: Cluster,
) -> None:
    """sbatch takes the job, which waits for the node; `--test-only` says that there is no such node."""
    nodes = sorted(on_cluster.nodes())
    with on_cluster.drained(nodes[0]):
        said = try_out(f"#!/bin/sh\n#SBATCH --nodes={len(nodes)} --time=5\ntrue\n").sentence
    assert said.startswith("Slurm refuses this, unless that is for nodes that are down at the moment: "), said


@pytest.mark.parametrize(
    ("said", "starts"),
    [
        (
            "sbatch: Job 7 to start at 2026-01-02T03:04:05 using 8 processors on nodes n[1-2] in gpu",
            True,
        ),
        ("", False),
    ],
)
def test_an_accepted_trial_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, starts: bool
) -> None:
    fake_sbatch(tmp_path, monkeypatch, said, 0)
    expected = (
        "Slurm would start this at 2026-01-02T03:04:05 on n[1-2]" if starts else "Slurm would take this"
    )
    trial = try_out("#!/bin/sh\n")
    assert (trial.sentence.removeprefix("as its queue stands, "), trial.starts) == (expected, starts)


def test_what_slurm_will_never_take_is_refused_and_silence_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sbatch(tmp_path, monkeypatch, "allocation failure: Job violates accounting/QOS policy", 1)
    with pytest.raises(SlurmError, match="violates accounting"):
        try_out("#!/bin/sh\n")
    for silence in ("Unable to contact slurm controller", "Could not establish a configuration source"):
        fake_sbatch(tmp_path, monkeypatch, silence, 1)
        trial = try_out("#!/bin/sh\n")
        assert (trial.starts, trial.was_heard) == (False, False)
        assert trial.sentence.startswith("Slurm was not asked whether it would take this: ")


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, status: int) -> None:
    """An sbatch in place of the real one: these words cannot all be had from one Slurm."""
    (folder / "sbatch").write_text(f"#!/bin/sh\ncat > /dev/null\necho '{said}' >&2\nexit {status}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_where_nobody_can_be_asked_the_refusal_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    error = SlurmError("sbatch failed", 1, "", "sbatch: error: Invalid account or account/partition")
    assert with_choices(error) is error
