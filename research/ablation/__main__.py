"""Compare the arms of an ablation over seeds: each arm an ordinary run, the table at the end.

    python -m research.ablation reward                      # 3 seeds, jobs/r1.yaml's cold start and RL
    python -m research.ablation attention --seeds 2 rl:train.num_steps=40
    python -m research.ablation precision --dry-run         # what would be run, and what not and why
    python -m research.ablation algorithm --arms grpo,dapo --out dapo.json
    python -m research.ablation algorithm countdown --every 5 --mark 0.4    # steps to a pass@1 of 0.4

Ablations: attention, reward, precision, algorithm. KEY=VALUE reaches every stage, traces:KEY=VALUE,
sft:KEY=VALUE or rl:KEY=VALUE those of a kind. The runs lie in RUN_ROOT/ablate-NAME, one chain per
seed. Again: what is finished is not run again, the rest goes on; --seeds may grow. Cold starts
are shared between the arms of a seed that do not change them, and between ablations.

On this machine (no Slurm) the seeds run one after the other, and the call ends with them. On Slurm
it ends when all is submitted, with the table of what is finished; --follow waits.

Run it from a checkout; it is not part of the installed package. Exit status 0: every arm is finished, or
submitted to Slurm; 1: one has failed. What was found so far: docs/claims.md, and measured/ in full.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1hpc.base.cli import ArgumentParser, add_run_root, print_json, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.base.names import printable
from r1hpc.base.run_dir import run_root_of
from r1hpc.slurm import flags

# What is needed only once something is asked for is imported where it is used: --help must be quick.
if TYPE_CHECKING:
    from r1hpc.submission.order import Order
    from r1hpc.submission.submit_chain import SubmittedChain
    from research.ablation.study import Study


def main(argv: Sequence[str]) -> int:
    """Submit what is missing, wait where that is the way, print the comparison."""
    from research.ablation.comparison import as_object, as_text
    from research.ablation.results import read_results
    from research.ablation.study import submit_seed

    arguments = _arguments(argv)
    os.umask(0o077)
    study, order, places = _study(arguments, argv)
    seeds = range(arguments.seeds)
    for note in study.notes:
        print(f"note     {note}", file=sys.stderr)
    if arguments.dry_run:
        done = [submit_seed(study, seed, order, places) for seed in seeds]
        _print_plan(study, done, arguments)
        return 0
    failed, submitted = False, []
    for seed in seeds:
        submitted.append(submit_seed(study, seed, order, places))
        if submitted[-1].executor == "local":
            failed |= _follow(submitted[-1]) != 0
    if arguments.follow:
        failed |= any(_follow(done) != 0 for done in submitted if done.executor != "local")
    results = read_results(study, seeds, places)
    if arguments.out:
        write_json(Path(arguments.out), results.to_json(), mode=0o644)
    if arguments.json:
        print_json({"study": str(study.path), **as_object(results, arguments.mark)})
    else:
        print(as_text(results, arguments.mark))
        if results.num_finished < results.num_wanted:
            print(f"\nruns in {study.path}; the same command again goes on, and shows what is finished then")
    return 1 if failed else 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m research.ablation", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="ABLATION | JOB.yaml | KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1; default 3")
    parser.add_argument("--arms", metavar="A,B", help="only these, and the baseline")
    parser.add_argument(
        "--every", type=int, default=0, metavar="N", help="evaluate after each N steps too, for --mark"
    )
    parser.add_argument("--mark", type=float, metavar="P", help="also compare the steps to a pass@1 of P")
    parser.add_argument("--executor", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument("--dry-run", action="store_true", help="list what would be run; write nothing")
    parser.add_argument("--follow", action="store_true", help="on Slurm: wait for the end")
    add_run_root(parser)
    parser.add_argument("--run-name", metavar="NAME", help="default ablate-ABLATION")
    parser.add_argument(
        "--cluster", metavar="NAME", help="profile in configs/cluster/; default $R1HPC_CLUSTER"
    )
    parser.add_argument("--over-budget", metavar="REASON", help="go over the budget, and say why")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON, as in measured/")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags.add_flags(parser)
    arguments: argparse.Namespace = parser.parse_intermixed_args(list(argv))
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}: at least 1, and an interval needs 2")
    if arguments.every < 0:
        parser.error(f"--every is {arguments.every}: steps between evaluations, at least 1")
    if arguments.mark is not None and not (0 < arguments.mark < 1 and arguments.every):
        parser.error("--mark is a share between 0 and 1, and needs --every N: evaluations on the way to it")
    return arguments


def _study(arguments: argparse.Namespace, argv: Sequence[str]) -> "tuple[Study, Order, list[str]]":
    """The study asked for, how to submit it, and the overrides about resources."""
    from r1hpc.config.assets import find_job
    from r1hpc.slurm.fields import refuse_shell_overrides
    from r1hpc.submission.chain.file import without_stage
    from r1hpc.submission.order import Order, Purpose
    from research.ablation.arms import ABLATIONS, find_ablation
    from research.ablation.study import USUAL_JOB, open_study, split_overrides

    words = [word for word in arguments.words if "=" not in word]
    if not words:
        raise UsageError(f"which ablation? There are: {', '.join(ABLATIONS)}")
    ablation = find_ablation(words[0])
    if len(words) > 2:
        raise UsageError(f"one ablation and at most one job file, not {printable(' '.join(words))}")
    given = [word for word in arguments.words if "=" in word]
    refuse_shell_overrides([without_stage(item) for item in given])
    trained, places = split_overrides(given)
    places = [
        *flags.overrides_from_environment(os.environ),
        *places,
        *flags.overrides_from_flags(arguments),
    ]
    root = run_root_of(arguments.run_root)
    folder = Order(run_root=root).folder(arguments.run_name or f"ablate-{ablation.name}")
    arms = arguments.arms.split(",") if arguments.arms else None
    job = find_job(words[1] if words[1:] else USUAL_JOB)
    study = open_study(
        folder.path, ablation.name, job, trained, arms, places, arguments.cluster, arguments.every
    )
    purpose = Purpose.dry_run if arguments.dry_run else Purpose.start
    order = Order(
        purpose,
        arguments.executor,
        tuple(argv),
        cluster=arguments.cluster,
        run_root=folder.path.parent,
        over_budget=arguments.over_budget,
    )
    return study, order, places


def _follow(done: "SubmittedChain") -> int:
    from r1hpc.api import ChainSubmission

    return ChainSubmission(done).follow(sys.stderr) if done.jobs else 0


def _print_plan(study: "Study", done: "Sequence[SubmittedChain]", arguments: argparse.Namespace) -> None:
    """A dry run: the arms, how each differs from the others, and the stages with what would be done."""
    from r1hpc.base.tables import format_table, wrap

    steps = [(seed, step) for seed, chain in enumerate(done) for step in chain.steps]
    if arguments.json:
        stages = [
            {"seed": n, "stage": s.stage.name, "needs": s.stage.needs, "action": s.action.value}
            for n, s in steps
        ]
        arms = [{"arm": arm.name, "words": arm.words, "rl": arm.rl, "sft": arm.sft} for arm in study.arms]
        print_json({"study": str(study.path), "arms": arms, "refused": study.refused, "stages": stages})
        return
    print(f"{study.ablation.name}: {study.ablation.question}\n")
    print(format_table(("arm", "is"), [(arm.name, arm.words) for arm in study.arms], indent="  "), end="\n\n")
    rows = [
        (str(n), s.stage.name, s.stage.config.stage, ", ".join(s.stage.needs) or "-", s.action.value)
        for n, s in steps
    ]
    print(format_table(("seed", "stage", "kind", "after", "would be"), rows, indent="  "))
    for name, reason in study.refused.items():
        print(wrap(f"not run: {name}: {reason}"))
    for note in dict.fromkeys(note for chain in done for note in chain.notes):
        print(wrap(f"note: {note}"))


if __name__ == "__main__":
    run_command(main)
