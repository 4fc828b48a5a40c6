"""The page docs/claims.md: the article's claims beside what r1hpc does and what was measured here.

    text = claims_page(read_measured(MEASURED))

The measurements are results of `r1hpc ablate … --out`, kept in r1hpc/chain/measured/, and arithmetic that
this file does itself. The same files make the same page.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from r1hpc.base.errors import ConfigError
from r1hpc.base.files import read_json
from r1hpc.chain.arms import ABLATIONS
from r1hpc.chain.claims_list import CLAIMS, Claim
from r1hpc.chain.comparison import (
    Difference,
    compared,
    difference_of,
    format_difference,
    format_number,
    mean_of,
)
from r1hpc.chain.results import ArmResult, Results
from r1hpc.plan.baselines import seed_formula, six_nd
from r1hpc.plan.batch import solve_batch
from r1hpc.plan.hardware import find_gpu
from r1hpc.plan.workload import Workload
from r1hpc.tasks.task import Item
from r1hpc.tasks.terms import Completion, Judged, efficiency_flops, efficiency_tokens

MEASURED = Path(__file__).parent / "measured"
Found = Mapping[str, Results]
NOT_MEASURED = "Not measured here."
_ARTICLE_ARM = "0.6_0.3_0.1"
_WIDTH = 110


def read_measured(folder: Path) -> dict[str, Results]:
    """The results in a folder, by ablation; those that are missing are missing.

    Raises:
        StateError: a file of another version.
    """
    paths = {name: folder / f"{name}.json" for name in ABLATIONS}
    return {name: Results.from_json(read_json(path)) for name, path in paths.items() if path.is_file()}


def claims_page(found: Found) -> str:
    """The whole page as Markdown."""
    rows = [
        f"| {number} | {claim.title} | {claim.verdict} | {'yes' if is_measured(claim, found) else 'no'} |"
        for number, claim in enumerate(CLAIMS, 1)
    ]
    table = ["| # | claim | public sources say | measured here |", "|---|---|---|---|", *rows]
    sections = [_section(number, claim, found) for number, claim in enumerate(CLAIMS, 1)]
    parts = [_HEAD, "\n".join(table), *sections, *_ablations(found)]
    return "\n\n".join(parts) + "\n"


def is_measured(claim: Claim, found: Found) -> bool:
    return claim.measured is not None and _MEASURED[claim.measured](found) is not None


def _section(number: int, claim: Claim, found: Found) -> str:
    measured = _MEASURED[claim.measured](found) if claim.measured else None
    lines = [
        f"- *The article:* {claim.claim}",
        f"- *Sources ({claim.verdict}):* {claim.sources}",
        f"- *r1hpc:* {claim.here}",
        f"- *Measured:* {measured or NOT_MEASURED}",
    ]
    return "\n".join([f"## {number}. {claim.title}", "", *map(_filled, lines)])


def _ablations(found: Found) -> list[str]:
    parts = ["# The ablations"]
    for name, ablation in ABLATIONS.items():
        head = f"## {name}: {ablation.question}"
        if name not in found:
            command = f"python -m r1hpc.ablate {name} --out r1hpc/chain/measured/{name}.json"
            parts.append(f"{head}\n\nNot run yet: `{command}`")
            continue
        results = found[name]
        parts += [f"{head}\n\n{_filled(_told(results))}", _means_table(results), _differences_table(results)]
        parts += [_filled(f"Not run: {arm}: {reason}.") for arm, reason in results.refused.items()]
    return parts


def _told(results: Results) -> str:
    told = results.provenance
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    some = next((outcome for arm in results.arms for outcome in arm.outcomes), None)
    if some is None:
        return f"`{told['command']}`: no arm is finished yet."
    missing = results.num_wanted - results.num_finished
    return (
        f"`{told['command']}`, {told['date']}, {told['machine']}; {versions}. Task {told['task']}, "
        f"{some.num_steps} steps of reinforcement learning, {some.num_items} held-out items with "
        f"{some.num_samples} samples each. Seeds {', '.join(map(str, results.seeds))}."
        + (f" {missing} of {results.num_wanted} arms are not finished." if missing else "")
    )


_COLUMNS = (
    ("greedy", "greedy", 3),
    ("T=1", "pass_at_1", 3),
    ("pass@n", "pass_at_n", 3),
    ("length", "response_length", 1),
    ("thinking", "thinking_share", 3),
    ("thinking right after SFT", "accuracy_given_thinking_before", 3),
    ("completions", "num_completions", 0),
    ("s/step", "step_time_s", 2),
    ("RL wall s", "wall_s", 0),
)
"""Heading, measure, digits."""


def _means_table(results: Results) -> str:
    heads = ["arm", "n", *(heading for heading, _, _ in _COLUMNS), "T=1 by seed"]
    rows = []
    for arm in results.arms:
        means = [format_number(mean_of(arm, key), digits) for _, key, digits in _COLUMNS]
        seeds = " ".join(format_number(arm.values("pass_at_1").get(seed)) for seed in results.seeds)
        rows.append([f"{arm.name}: {arm.words}", str(len(arm.outcomes)), *means, seeds])
    return _markdown(heads, rows)


def _differences_table(results: Results) -> str:
    first = f"minus {results.arms[0].name}, paired by seed"
    keys, rows = compared(results), []
    for arm in results.arms[1:]:
        found = [difference_of(results, arm, key) for key in keys]
        rows.append([arm.name, str(found[0].n if found[0] else 0), *map(format_difference, found)])
    headings = (words.replace("acc|think", "thinking right after") for words in keys.values())
    return _markdown([first, "n", *(f"{heading} [95 %]" for heading in headings)], rows)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _filled(line: str) -> str:
    return textwrap.fill(
        line, _WIDTH, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False
    )


def _against(results: Results, arm: ArmResult, key: str = "pass_at_1") -> str:
    """`gate -0.050 [-0.071, -0.029], n=2: lower`."""
    difference = difference_of(results, arm, key)
    if difference is None:
        return f"{arm.name}: not finished"
    return f"{arm.name} {format_difference(difference)} (n={difference.n}, {_clear(difference)})"


def _clear(difference: Difference) -> str:
    if difference.low is None:
        return "one seed, no interval"
    if not difference.is_clear:
        return "not told apart"
    return "higher" if difference.mean > 0 else "lower"


def _all_against(found: Found, name: str, arms: Sequence[str] | None = None) -> str | None:
    if name not in found:
        return None
    results = found[name]
    chosen = [arm for arm in results.arms[1:] if arms is None or arm.name in arms]
    if not any(arm.outcomes for arm in chosen):
        return None
    said = "; ".join(_against(results, arm) for arm in chosen)
    return f"accuracy of samples minus that of {results.arms[0].name}, 95 % over seeds: {said}."


def _attention(found: Found) -> str | None:
    return _all_against(found, "attention")


def _algorithm(found: Found) -> str | None:
    return _all_against(found, "algorithm")


def _dapo(found: Found) -> str | None:
    said = _all_against(found, "algorithm", ["dapo"])
    if said is None:
        return None
    results = found["algorithm"]
    ours, theirs = (mean_of(results.arm(name), "num_completions") for name in ("dapo", "grpo"))
    return f"{said} It sampled {format_number(ours, 0)} completions, grpo {format_number(theirs, 0)}."


def _reward(found: Found) -> str | None:
    return _all_against(found, "reward")


def _length(found: Found) -> str | None:
    if "reward" not in found or not found["reward"].arm(_ARTICLE_ARM).outcomes:
        return None
    results = found["reward"]
    arm, baseline = results.arm(_ARTICLE_ARM), results.arms[0]
    ours, theirs = mean_of(arm, "response_length"), mean_of(baseline, "response_length")
    if ours is None or theirs is None:
        return None
    return (
        f"answers have {ours:.2f} tokens with the article's weights, {theirs:.2f} with the rule reward "
        f"({100 * (ours / theirs - 1):+.1f} %); in tokens: {_against(results, arm, 'response_length')}."
    )


def _gate_time(found: Found) -> str | None:
    """The F1 is not measured; the time of a step is, at this size."""
    if "attention" not in found or not found["attention"].arm("gate").outcomes:
        return None
    results = found["attention"]
    seconds = {arm.name: mean_of(arm, "step_time_s") for arm in results.arms}
    told = ", ".join(f"{name} {format_number(value, 2)} s" for name, value in seconds.items())
    return (
        f"not the F1, and no context of 1,024 tokens: the task has 24. A GRPO step took {told} on a shared "
        "machine, where only large ratios mean something."
    )


def _precision(found: Found) -> str | None:
    said = _all_against(found, "precision")
    if said is None:
        return None
    results = found["precision"]
    seconds = ", ".join(f"{a.name} {format_number(mean_of(a, 'step_time_s'), 2)} s" for a in results.arms)
    return f"on CPU only: {said} A GRPO step took {seconds}. FP8 and the 40 % were not measured."


def _flops_term(found: Found) -> str | None:
    answers = [_judged(length) for length in (2, 8, 16)]
    flops = {efficiency_flops(answer) for answer in answers}
    tokens = [round(efficiency_tokens(answer), 3) for answer in answers]
    assert len(flops) == 1, "the term would say something after all"
    return (
        "three answers of 2, 8 and 16 tokens get the same efficiency_flops, so a group of them has no "
        f"advantage; efficiency_tokens gives {', '.join(map(str, tokens))}."
    )


def _judged(length: int) -> Judged:
    completion = Completion("1" * length, length, False)
    return Judged(Item(0, "1=", "1"), completion, True, True, 16, flops_per_token=2e6)


def _batch(found: Found) -> str | None:
    try:
        solve_batch(256, 32, 4, 8)
    except ConfigError as error:
        return f'these settings are refused: "{str(error).split(". ")[0]}".'
    raise AssertionError("32 x 8 x 4 is not 256")


def _gpu_hours(found: Found) -> str | None:
    tokens = 25e9
    work = Workload.of_counts(params=7e9, tokens=tokens, gpu=find_gpu("a100-80gb"))
    return (
        f"arithmetic: the formula itself gives {seed_formula(7e9, 100):.0f} for 7 B and 100 GB, not 560; 6ND "
        f"for {tokens / 1e9:.0f} B tokens at 40 % of an A100's 312 TFLOP/s is {six_nd(work, 0.40):,.0f} "
        "GPU-hours."
    )


_MEASURED: dict[str, Callable[[Found], str | None]] = {
    "attention": _attention,
    "gate_time": _gate_time,
    "algorithm": _algorithm,
    "reward": _reward,
    "flops_term": _flops_term,
    "length": _length,
    "dapo": _dapo,
    "batch": _batch,
    "precision": _precision,
    "gpu_hours": _gpu_hours,
}

_HEAD = """\
# The article's claims, and what was measured here

Made by `python -m r1hpc.claims --out docs/claims.md`; do not edit. The measurements come from
`r1hpc/chain/measured/`, which `python -m r1hpc.ablate NAME --out FILE` writes.

"The article" is a Chinese post of 15 September 2025 on a cloud vendor's developer site, about a hundred days
of attempts to reproduce DeepSeek-R1. r1hpc began as the toolkit it describes. Many of its numbers have no
source, and some contradict others; r1hpc offers what it names as options, says what each is, and measures
what it can.

The measurements are of a model of 0.34 M parameters that adds six digits modulo 10, on CPU cores shared with
other work. They show mechanisms, such as where a reward stops paying for thinking; they do not carry over to
large models. Intervals are 95 % of Student's t over the seeds, on differences paired by seed, not corrected
for the number of arms; with two or three seeds they are wide. "Not told apart" is not "equal". Times were
taken on a busy machine. "At second hand" marks facts read in a secondary source."""
