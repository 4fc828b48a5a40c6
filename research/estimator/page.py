"""The page scores.md: what was scored, on what, and beside which baselines.

page(rows, fit_and_score(rows))       # Markdown
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1hpc.plan.hours.estimate import CONSTANT_MFU, eight_nd, seed_formula, six_nd, text_gigabytes
from r1hpc.plan.hours.mfu import NAMES, parse_coefficients
from r1hpc.plan.hours.rl import LENGTH_SD
from r1hpc.plan.hours.spread import Z90
from research.estimator.held_out import HEADS, held_out_lines
from research.estimator.published_rows import SINGLE_NODE_FAMILY, Published
from research.estimator.regression import PRIOR
from research.estimator.rl import halves
from research.estimator.scoring import GROUPS, Fitted, Scored, coverage, is_a100, mdape, width


def page(rows: Sequence[Published], found: Fitted) -> str:
    value, scored = found.coefficients, found.scored
    scale = value["width_scale"]
    parts = [
        _HEAD,
        "## Families set aside",
        _HELD_OUT,
        _markdown(HEADS, held_out_lines(parse_coefficients(value))),
        _HELD_OUT_LIMITS,
        "## Left-out families",
        _LEFT_OUT,
        _groups_table([(name, [s for s in scored if belongs(s.row)], scale) for name, belongs in GROUPS]),
        _ASKED,
        _groups_table(_asked_groups(found.asked)),
        _CODE_BASES,
        _code_bases_table(value["scored"], found.strict),
        "## Baselines on the same rows",
        _BASELINES,
        _baselines_table(rows, found),
        "## Whole runs, one by one",
        _ONE_BY_ONE,
        _runs_table(found.asked),
        "## By family",
        _families_table(scored, scale),
        "## Coefficients of ln(MFU)",
        _coefficients_table(value),
        "## Reinforcement learning",
        _RL,
        _rl_table(value["rl"]),
        _TAIL,
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


_HEAD = """
# How good the estimate is

    python -m research.estimator.fit             # fit on research/estimator/published/, write this page
    python -m research.estimator.fit --check     # has anything changed?
    python -m research.estimator.held_out        # errors on the families set aside

GPU-hours = FLOPs / (peak x MFU x goodput). FLOPs follow from the model's shape. ln(MFU) is a linear function
of what is known about a run (`r1hpc/plan/hours/mfu.py`). Every coefficient has a prior from physics. Each
software stack has a random intercept and attention slope, so a family has one vote, however many rows it has.
Goodput is Daly's, with one failure per 50,000 GPU-hours by default. MFU excludes recomputation and counts the
full square of attention scores, against dense bf16 peaks (A100 312, H100 989 TFLOP/s).
"""

_HELD_OUT = """
No fit sees `published/held_out.csv`. It has DeepSeek-V3, GPT-OSS 120B, Nemotron 3 Nano, Llama 3 70B and
Llama 3.1 405B of Megatron-Bridge, both tables of torchtitan, and Trainy's Llama 3.1 8B on H200. Figures are
the mean of |ln(predicted / actual)|, with the stack given (`--stack`) and without. "Best constant" is 6ND at
the one MFU that suits all of these rows best, chosen in hindsight.
"""

_HELD_OUT_LIMITS = """
- Other models of Megatron-Bridge, NeMo 24.12 and NeMo 25 are fitted: the same software and cards.
- A person who knew these rows set the prior of `fp4` and the widths, and made the features know that GB200
  and GB300 share NVLink across a rack. So expect larger errors on new tables. For FP4 nothing was held back.
- No published run uses DeepSpeed with FP8. In a class without published families the command says "no data"
  and widens the interval: it adds a standard deviation of 0.3 to ln(hours), times the width scale.
"""

_LEFT_OUT = """
Each row is predicted by a fit without its family. Families that the same authors measured with the same
software are left out together (both llm-foundry tables and the MPT runs; both vTrain tables). Some other
families share a code base; a table below leaves those out together too.

MdAPE is the median of |predicted / actual - 1| in hours. Coverage is the share of the rows inside P10 to P90,
counted by row and with one vote per family. The width of the interval was scaled once, so that it covers 80 %
of the left-out families (without the single-node table). The *form* of the interval was chosen by a person
who knew these rows. So expect a little less coverage on other runs.
"""

_ASKED = """
In this table the estimator knew whether the hours are ideal (throughput x tokens) or elapsed. Nobody knows
that before a run. So the command assumes the failures that a run of this size implies, and three tenths of
what elapsed runs lost beyond that. With this share both kinds together have no bias. The same runs as
`python -m r1hpc.estimate` predicts them, still without their family:
"""

_CODE_BASES = """
Pythia and GPT-NeoX-20B were trained with GPT-NeoX. The Megatron tables of 2021, MT-NLG and Megatron Core on
H100 share one code base over four years. Forks (BLOOM's Megatron-DeepSpeed) count as separate. With these two
groups left out together, at the same width:
"""

_ONE_BY_ONE = """
Predicted as by the command, each without its family.
"""

_BASELINES = """
MdAPE of each. "Median MFU" is 6ND at the median MFU of the other families with the same GPU type, one vote
each. `--method seed` shows the seed formula.
"""

_RL = """
DeepSpeed-Chat step 3 is the only published family with token counts. Two rates are fitted on every second row
and scored on the others, both ways round. The form of the losses (gathered weights beyond a node, offloaded
states, a full cache) was chosen with these rows in view. Eleven rows are too few to hold any back.
"""

_RL_WIDTH = """
That is the error within one stack. Stacks differ by more. OpenRLHF's README claims twice the speed of
DeepSpeed-Chat; HybridFlow (arXiv 2409.19256) claims 1.53 to 20.57 times the speed of three others. An
estimate therefore adds a standard deviation of {stack:.2f} between stacks, a factor 2 between two of them. It
adds {length:g} for the mean length of completions, times how much hours grow with it. Both are chosen, not
fitted. P90/P10 becomes 5 to 6; from the errors within the stack alone it would be 1.8.

Without vLLM (`rollout.engine=sampler`) each layer's kernels are launched one by one. A decoding step then
takes at least 0.8 ms per layer, however small the model. Qwen's benchmark with transformers on an A100-80GB
at batch size 1 has 49.94 tokens/s for Qwen2-0.5B, which is 0.83 ms for each of 24 layers. Qwen-1.8B, 7B and
14B have 54.09, 40.93 and 32.22 tokens/s: 0.77, 0.76 and 0.78 ms. Adapters that are not merged take longer;
that was not measured.
"""

_TAIL = """
## What this does not know

- Data loading, compilation, evaluation inside the loop and slow nodes are in the coefficient `run`, on
  average. Queue time is not included.
- Layouts (tensor, pipeline) matter up to a factor 3.8 at the same number of GPUs. If they are not given, the
  constant stands for the usual ones.
- H100 and H800 runs come from three teams. Two rows (8 B on 15 T tokens) cost twice what the model explains.
- FP32 and TF32 have no published run. The ratio of the peaks is used.
- CPU runs use other rules: `r1hpc/plan/hours/estimate_run.py`.

Your own finished runs correct the estimate: `r1hpc/accounting/correction.py`.
"""


def _asked_groups(asked: Sequence[Scored]) -> list[tuple[str, Sequence[Scored], float]]:
    a100 = [s for s in asked if is_a100(s.row)]
    return [
        ("A100 whole runs", a100, 1.0),
        ("of them ideal hours", [s for s in a100 if not s.row.is_long], 1.0),
        ("of them elapsed hours", [s for s in a100 if s.row.is_long], 1.0),
        ("verified, without phi-2", [s for s in a100 if s.row.verified and s.row.family != "phi"], 1.0),
        ("H100, H800 whole runs", [s for s in asked if not is_a100(s.row)], 1.0),
    ]


def _groups_table(groups: Sequence[tuple[str, Sequence[Scored], float]]) -> str:
    lines = [
        (
            name,
            str(len(group)),
            str(len({s.row.family for s in group})),
            f"{mdape([s.error for s in group]):.3f}",
            f"{math.exp(statistics.median(s.error for s in group)):.2f}",
            f"{coverage(group, scale):.0%}",
            f"{coverage(group, scale, by_family=True):.0%}",
            f"{width(group, scale):.2f}",
        )
        for name, group, scale in groups
    ]
    heads = ("rows", "n", "families", "MdAPE", "bias", "coverage", "by family", "median P90/P10")
    return _markdown(heads, lines)


def _code_bases_table(scored: Mapping[str, float], strict: Mapping[str, float]) -> str:
    kinds = {
        "runs": "A100 whole runs, kind of hours given",
        "runs_asked": "A100 whole runs, as the command answers",
        "tables": "A100 throughput tables",
    }
    lines = [
        (
            name,
            *(f"{each[f'a100_{kind}_mdape']:.3f}" for each in (scored, strict)),
            *(f"{each[f'a100_{kind}_coverage']:.0%}" for each in (scored, strict)),
        )
        for kind, name in kinds.items()
    ]
    return _markdown(("rows", "MdAPE", "by code base", "coverage", "by code base"), lines)


def _baselines_table(rows: Sequence[Published], found: Fitted) -> str:
    scored = found.scored
    methods: list[tuple[str, Callable[[Published], float]]] = [
        ("seed formula, 4 bytes a token", _log_seed),
        ("8ND at 150 of 312 TFLOP/s", lambda row: _log_ratio(row, eight_nd(row.workload))),
        *((f"6ND at {mfu:.0%} MFU", _constant(mfu)) for mfu in CONSTANT_MFU),
        ("6ND at the median MFU of others", lambda row: _median_of_others(row, rows)),
    ]
    groups = GROUPS[:4]
    lines = []
    for name, method in methods:
        errors = [[method(s.row) for s in scored if belongs(s.row)] for _, belongs in groups]
        lines.append((name, *(f"{mdape(each):.3f}" for each in errors)))
    asked = (*found.asked, *(s for s in scored if not s.row.is_run))
    for name, ours in (("kind of hours given", scored), ("as the command answers", asked)):
        errors = [[s.error for s in ours if belongs(s.row)] for _, belongs in groups]
        lines.append((f"**this estimator, {name}**", *(f"**{mdape(each):.3f}**" for each in errors)))
    return _markdown(("estimator", *(name for name, _ in groups)), lines)


def _constant(mfu: float) -> Callable[[Published], float]:
    return lambda row: _log_ratio(row, six_nd(row.workload, mfu))


def _log_ratio(row: Published, hours: float) -> float:
    """ln(predicted / actual) for hours of the row's tokens."""
    return math.log(hours / row.workload.gpu_hours_at(row.measured_mfu))


def _log_seed(row: Published) -> float:
    """A rate has no tokens; the formula is then asked for as many as 20 a parameter."""
    work = row.workload
    tokens = work.tokens if row.is_run else 20 * work.params
    actual = tokens / work.tokens * work.gpu_hours_at(row.measured_mfu)
    return math.log(seed_formula(work.params, text_gigabytes(tokens)) / actual)


def _mfu_6nd(row: Published) -> float:
    return row.measured_mfu * 6 * row.workload.active_params / row.workload.flops_per_token


def _median_of_others(row: Published, rows: Sequence[Published]) -> float:
    """Runs are predicted by runs, tables by tables; one vote for the median of each family."""
    alike = [
        other
        for other in rows
        if other.team != row.team
        and other.scored
        and other.is_run == row.is_run
        and is_a100(other) == is_a100(row)
        and other.family != SINGLE_NODE_FAMILY
    ]
    families = {other.family for other in alike}
    medians = [statistics.median(_mfu_6nd(o) for o in alike if o.family == name) for name in sorted(families)]
    return _log_ratio(row, six_nd(row.workload, statistics.median(medians)))


def _runs_table(asked: Sequence[Scored]) -> str:
    lines = []
    for s in asked:
        actual, half = s.row.gpu_hours or math.nan, Z90 * s.sd
        lines.append(
            (
                s.row.id,
                s.row.workload.gpu.name,
                s.row.hours_kind + ("" if s.row.verified else ", not verified"),
                f"{actual:,.0f}",
                *(f"{actual * math.exp(s.error + k * half):,.0f}" for k in (-1, 0, 1)),
                f"{math.exp(s.error):.2f}",
                "yes" if abs(s.error) <= half else "no",
            )
        )
    heads = ("run", "GPU", "hours", "actual", "P10", "P50", "P90", "P50 / actual", "inside")
    return _markdown(heads, lines)


def _families_table(scored: Sequence[Scored], scale: float) -> str:
    lines = []
    for family in dict.fromkeys(s.row.family for s in scored):
        group = [s for s in scored if s.row.family == family]
        lines.append(
            (
                family,
                "runs" if group[0].row.is_run else "steps",
                str(len(group)),
                f"{mdape([s.error for s in group]):.3f}",
                f"{math.exp(statistics.median(s.error for s in group)):.2f}",
                f"{coverage(group, scale):.0%}",
            )
        )
    return _markdown(("family", "of", "n", "MdAPE", "bias", "coverage"), lines)


def _coefficients_table(value: Mapping[str, Any]) -> str:
    lines = []
    for i, name in enumerate(NAMES):
        mean, sd = PRIOR[name]
        found = f"{value['mean'][i]:+.3f} ± {math.sqrt(value['covariance'][i][i]):.3f}"
        lines.append((f"`{name}`", f"{mean:+.2f} ± {sd:.2f}", found))
    return _markdown(("feature", "before any row", "after"), lines)


def _rl_table(known: Mapping[str, float]) -> str:
    found = halves()
    lines = [
        (
            row.id,
            f"{row.gpu_hours:,.1f}",
            f"{row.gpu_hours * math.exp(error):,.1f}",
            f"{math.exp(error):.2f}",
        )
        for row, error in found
    ]
    worst = math.exp(max(abs(error) for _, error in found))
    median = math.exp(statistics.median(abs(error) for _, error in found))
    table = _markdown(("run", "actual", "from the other half", "ratio"), lines)
    return (
        f"{table}\n\nLargest factor {worst:.2f}, median factor {median:.2f}. From all rows: arithmetic at "
        f"{known['arithmetic']:.0%} of the peak, reading at {known['bandwidth']:.0%} of the bandwidth, "
        f"standard deviation of ln(hours) {known['log_sd']:.2f}.\n"
        + _RL_WIDTH.format(stack=known["stack_sd"], length=LENGTH_SD)
    )


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
