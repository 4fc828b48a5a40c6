"""What a real sbatch refuses, and what a user is offered instead."""

import re
from pathlib import Path

import pytest

from r1hpc.slurm.client import SlurmError
from r1hpc.slurm.refusals import with_choices
from r1hpc.slurm.sbatch import sbatch
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
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], offered: str
) -> None:
    for name, value in cluster.env().items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\ntrue\n")
    with pytest.raises(SlurmError) as refused:
        sbatch(script, tmp_path, flags)
    assert re.search(offered, str(refused.value)), str(refused.value)
    assert not refused.value.may_have_arrived


def test_where_nobody_can_be_asked_the_refusal_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    error = SlurmError("sbatch failed", 1, "", "sbatch: error: Invalid account or account/partition")
    assert with_choices(error) is error
