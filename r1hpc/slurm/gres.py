"""Count the GPUs in what Slurm allocated (AllocTRES), also parts of a GPU: MIG slices, shards and MPS."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from r1hpc.base.errors import UsageError

MOST = 2**31 - 1
"""No job has more GPUs, nodes or restarts."""
_TRES = re.compile(r"[^\s,=]+=[^\s,=]+(,[^\s,=]+=[^\s,=]+)*")
_GRES = re.compile(r"(?:^|,)gres/(gpu|shard|mps)(?::([^=,]+))?=(\d+)")
_BILLING = re.compile(r"(?:^|,)billing=(\d+)(?=,|$)")
_MIG = re.compile(r"(?:^|[^0-9a-z])(?:([1-7])c\.)?([1-7])g\.(\d+)gb", re.IGNORECASE)
_QUARTERS = frozenset((("1", "6"), ("2", "12"), ("4", "24")))
"""Profiles of an A30."""
Shares = Mapping[str, int]
"""Shards (`shard`) and MPS parts (`mps`) that make one GPU."""
NO_SHARES: Shares = MappingProxyType({})
_MOST_SHARES = 1000


def gpus_by_type(alloc_tres: str, shares: Shares = NO_SHARES) -> dict[str, Fraction]:
    """Return the GPUs in an AllocTRES such as "cpu=4,gres/gpu:a100=8,gres/gpu=8,node=4", each once, by type.

    Slurm lists the total and the same GPUs by type; some sites configure only one of them. The type is empty
    if unknown. A MIG slice is as many sevenths of its GPU as its profile has (3g.20gb: 3; quarters on an
    A30). `shares` tells how many shards or MPS parts a GPU has; if it does not, they count as none. Raise
    ValueError for more GPUs than any job has, or another format.
    """
    if "gres/" not in alloc_tres and " " not in alloc_tres:
        return {}
    if not _TRES.fullmatch(alloc_tres):
        raise ValueError(f"AllocTRES is {alloc_tres!r}, which is no list such as cpu=4,gres/gpu=8")
    total, found = 0, dict[str, Fraction]()
    typed = 0
    for kind, name, text in _GRES.findall(alloc_tres):
        count = at_most(int(text), "AllocTRES", alloc_tres)
        if kind != "gpu":
            if shares.get(kind) and not name:
                found[kind] = Fraction(count, shares[kind])
        elif name:
            typed += count
            found[name] = found.get(name, Fraction(0)) + count * slice_of(name)
        else:
            total = count
    if total > typed:
        found[""] = Fraction(total - typed)
    elif total and total < typed:
        raise ValueError(f"AllocTRES is {alloc_tres!r}: more GPUs by type than in all")
    at_most(math.ceil(sum(found.values())), "AllocTRES", alloc_tres)
    return found


def slice_of(gpu_type: str) -> Fraction:
    """Return the part of a GPU that one of a type is, 1 except for a MIG slice such as a100_3g.20gb."""
    profile = _MIG.search(gpu_type)
    if profile is None:
        return Fraction(1)
    part, slices, memory = profile.groups()
    return Fraction(int(part or slices), 4 if (slices, memory) in _QUARTERS else 7)


def unknown_shares(alloc_tres: str, shares: Shares) -> set[str]:
    """Return which of `shard` and `mps` it holds without a word in `shares` on how many make a GPU."""
    held = _GRES.findall(alloc_tres)
    return {kind for kind, _, count in held if kind not in ("gpu", *shares) and count.strip("0")}


def parse_shares(given: str, where: str) -> dict[str, int]:
    """Parse shard=4,mps=100, written at `where`; raise UsageError for anything else."""
    shares = {}
    for part in given.replace(" ", "").split(","):
        name, _, count = part.partition("=")
        if name not in ("shard", "mps") or not count.isdecimal() or not 1 <= int(count) <= _MOST_SHARES:
            raise UsageError(f"{where} {given}: write it as shard=4, mps=100 or shard=4,mps=100")
        shares[name] = int(count)
    return shares


def billing_of(alloc_tres: str) -> int:
    """Return the billing TRES, by which a site weighs GPUs, CPUs and memory (TRESBillingWeights); 0: none."""
    billing = _BILLING.search(alloc_tres)
    return at_most(int(billing[1]), "AllocTRES", alloc_tres) if billing else 0


def plain(gpus: Fraction | int) -> float:
    """Return an int if it is whole: earlier versions of r1hpc read the records too."""
    return int(gpus) if gpus == int(gpus) else float(gpus)


def at_most(count: int, column: str, text: str) -> int:
    if not 0 <= count <= MOST:
        raise ValueError(f"{column} is {text!r}, and no job has so many")
    return count
