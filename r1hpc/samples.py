"""Show prompts and completions of a run, with rewards by term.

    python -m r1hpc.samples RUN                   # of the newest step, and of the newest evaluation
    python -m r1hpc.samples RUN --step 40         # of step 40, and of the evaluation after it
    python -m r1hpc.samples RUN --wrong           # only wrong ones
    python -m r1hpc.samples RUN --json            # all of them, as one JSON object

Of training a share is kept: 8 completions of the newest rollout and of up to 256 earlier ones. Evaluations
keep every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from r1hpc.base.choose_run import add_run, choose_run, full_name
from r1hpc.base.cli import ArgumentParser, add_json, print_result, run_command
from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable
from r1hpc.base.tables import coloured, wrap

if TYPE_CHECKING:  # only for types: --help must be quick
    from r1hpc.telemetry.records.samples import Sample

_KINDS = {"training": "sampled for training", "evaluation": "evaluation", "generated": "generated"}


def main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m r1hpc.samples", description=__doc__)
    add_run(parser, "a run, or a chain: its newest stage with completions")
    parser.add_argument("--step", type=int, metavar="N", help="this step's; default: the newest")
    parser.add_argument("--wrong", action="store_true", help="only those judged wrong")
    parser.add_argument(
        "--num", type=int, default=4, metavar="K", help="show at most K of each kind; default 4"
    )
    add_json(parser)
    arguments = parser.parse_args(argv)
    from r1hpc.telemetry.records.samples import has_samples, read_samples

    if arguments.num < 1:
        raise UsageError(f"--num {arguments.num}: show at least 1")
    run = choose_run(arguments.run_dir, arguments.run_root, has_samples)
    found = read_samples(run, arguments.step)
    chosen = [each for each in found if each.correct is False] if arguments.wrong else found
    shown = {"run_id": run.run_id, "run_dir": str(run.path), "samples": [asdict(each) for each in chosen]}
    print_result(shown, coloured(_text(full_name(run), found, chosen, arguments.num)), arguments.json)
    return 0


def _text(name: str, found: Sequence[Sample], chosen: Sequence[Sample], most: int) -> str:
    blocks = []
    for (kind, step), group in groupby(found, key=lambda each: (each.kind, each.step)):
        there = list(group)
        shown = [each for each in there if each in chosen][:most]
        where = "" if step is None else f", step {step}"
        num_wrong = sum(each.correct is False for each in there)
        judged = f", {num_wrong} wrong" if any(each.correct is not None for each in there) else ""
        blocks.append(wrap(f"{name}{where}, {_KINDS[kind]}: {len(shown)} of {len(there)} kept{judged}"))
        blocks += [_one(each) for each in shown]
    return "\n\n".join(blocks)


def _one(sample: Sample) -> str:
    verdicts = {True: "correct", False: "WRONG", None: "not judged"}
    facts = [verdicts[sample.correct]]
    facts += [f"expected {sample.expected}"] if sample.expected is not None else []
    facts += [f"reward {sample.reward:.3f}"] if sample.reward is not None else []
    facts += [f"{name} {value:.3g}" for name, value in sample.terms.items()]
    facts += [f"{sample.tokens:g} tokens"] if sample.tokens is not None else []
    facts += ["cut off"] if sample.is_cut else []
    if sample.num_samples:
        facts.append(f"{sample.num_correct} of {sample.num_samples} sampled answers correct")
    title = "" if sample.item is None else f"item {sample.item}: "
    return "\n".join(
        [
            wrap(f"{title}{', '.join(facts)}", "  ", "    "),
            *_indented("prompt", sample.prompt),
            *_indented("completion", sample.completion),
        ]
    )


def _indented(name: str, text: str) -> list[str]:
    return [f"    {name}", *(f"      {printable(line)}" for line in text.split("\n"))]


if __name__ == "__main__":
    run_command(main)
