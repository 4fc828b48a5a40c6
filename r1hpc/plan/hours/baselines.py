"""Compute the simple estimates in use today, to compare with ours.

The seed formula is from the article this project started from: parameters in units of 10^8, times 0.8, plus
0.3 for each GB of text. It adds where cost multiplies; no constant repairs that.
"""

from r1hpc.plan.hours.workload import Workload

BYTES_PER_TOKEN = 4.0
"""English text, roughly; 3.5 to 4.5 for usual tokenizers."""
CONSTANT_MFU = (0.35, 0.40, 0.50)
_BIGSCIENCE_TFLOPS = 150.0


def seed_formula(params: float, gigabytes: float) -> float:
    """Return the GPU-hours of the article's formula: 86 for 7 B parameters and 100 GB; it prints 560.

    >>> seed_formula(7e9, 100)
    86.0
    """
    return params / 1e8 * 0.8 + gigabytes * 0.3


def text_gigabytes(tokens: float) -> float:
    return tokens * BYTES_PER_TOKEN / 1e9


def six_nd(work: Workload, mfu: float) -> float:
    """Return 6 x active params x tokens (Kaplan et al., arXiv 2001.08361) at constant MFU, no attention."""
    return 6 * work.active_params * work.tokens / (mfu * work.gpu.peak_flops) / 3600


def eight_nd(work: Workload) -> float:
    """Apply BLOOM's planning rule: 8ND, with recomputation (arXiv 2104.04473, section 5.1), at 150 of 312
    TFLOP/s; the same share of other peaks."""
    rate = _BIGSCIENCE_TFLOPS / 312 * work.gpu.peak_flops
    return 8 * work.active_params * work.tokens / rate / 3600


def baselines(work: Workload) -> dict[str, float]:
    """Return the GPU-hours of every baseline that needs no fit."""
    constant = {f"6nd_at_{round(100 * mfu)}": six_nd(work, mfu) for mfu in CONSTANT_MFU}
    return {
        "seed_formula": seed_formula(work.params, text_gigabytes(work.tokens)),
        **constant,
        "8nd_at_150_tflops": eight_nd(work),
    }
