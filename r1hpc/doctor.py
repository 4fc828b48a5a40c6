"""Check a cluster before using it: versions, network, clocks, disk, preemption.

    python -m r1hpc.doctor                              # on a login node
    python -m r1hpc.doctor jobs/train.yaml              # with the needs of a job, or of your train.py
    salloc -N 2 -t 10 python -m r1hpc.doctor --nodes 2  # on the nodes of an allocation, and between them
    python -m r1hpc.doctor --write-profile configs/cluster/mine.yaml

Also shared memory, the run root (space, speed, locks), GPUs and time limits. Each finding is ok,
warn, fail or unknown, and names the fix. Exit status 0: nothing failed. It writes 64 MiB under the run root
and removes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from r1hpc.base.cli import (
    ArgumentParser,
    add_cluster,
    add_job_words,
    add_json,
    add_run_root,
    file_and_overrides,
    print_json,
    run_command,
)
from r1hpc.base.errors import UsageError
from r1hpc.base.run_dir import run_root_of
from r1hpc.base.tables import coloured, wrap

if TYPE_CHECKING:
    from r1hpc.preflight.findings import SiteFinding


def main(argv: Sequence[str]) -> int:
    arguments, of_script = _parser().parse_command(argv, "r1hpc.script.launcher")
    job, overrides = file_and_overrides(arguments.words)
    if arguments.node_part is not None:
        from r1hpc.preflight.nodes import node_part

        print(node_part(arguments.node_part), flush=True)
        return 0
    if arguments.nodes is not None and arguments.nodes < 1:
        raise UsageError(f"--nodes {arguments.nodes}: at least 1")
    from r1hpc.preflight.profile import profile_name, write_profile
    from r1hpc.preflight.run_all import examine

    root, overrides = run_root_of(arguments.run_root), [*overrides, *of_script]
    found = examine(job, root, arguments.nodes, arguments.cluster, arguments.partition, overrides)
    profile, file = found.profile, arguments.write_profile
    if file is not None:
        profile = {**profile, "name": file.stem}
        write_profile(file, profile)
    passed = all(finding.state.value != "fail" for finding in found.findings)
    if arguments.json:
        findings = [asdict(finding) for finding in found.findings]
        print_json({"passed": passed, "findings": findings, "profile": profile})
    else:
        print(coloured(as_text(found.findings)))
        if file is not None:
            print(f"wrote {file}; to use it: export R1HPC_CLUSTER={profile_name(file)}")
    return 0 if passed else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m r1hpc.doctor", description=__doc__)
    what = "a job whose needs are held against the site, and its overrides"
    add_job_words(parser, "JOB.yaml | SCRIPT.py | KEY=VALUE", what)
    parser.add_argument("-N", "--nodes", type=int, metavar="N", help="look at N nodes of this allocation")
    add_cluster(parser)
    what = "look at this one; default $SBATCH_PARTITION, the job's, the profile's, else Slurm's"
    parser.add_argument("-p", "--partition", metavar="NAME", help=what)
    parser.add_argument(
        "--write-profile", type=Path, metavar="FILE", help="write what was found as a profile"
    )
    add_run_root(parser)
    add_json(parser)
    # srun starts this on each node.
    parser.add_argument("--node-part", metavar="JSON", help=argparse.SUPPRESS)
    return parser


def as_text(findings: Sequence[SiteFinding]) -> str:
    """Return a line per finding, its fix below it, and a summary."""
    lines = []
    for finding in findings:
        lines.append(wrap(f"{finding.state.value:8}{finding.check}: {finding.detail}", hanging=" " * 8))
        if finding.fix:
            lines.append(wrap(f"fix: {finding.fix}", indent=" " * 8, hanging=" " * 8))
    states = [finding.state.value for finding in findings]
    counts = [f"{states.count(name)} {name}" for name in ("ok", "warn", "fail", "unknown")]
    return "\n".join([*lines, "", ", ".join(counts)])


if __name__ == "__main__":
    run_command(main)
