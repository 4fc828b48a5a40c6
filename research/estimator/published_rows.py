"""The published runs and throughput tables, as workloads with what was measured.

rows = read_published()          # packaged CSVs, in their order
rows[0].measured_mfu, rows[0].hours_kind
"""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from r1hpc.plan.hours.goodput import FailureRates, overhead
from r1hpc.plan.hours.mfu import num_gpus_of
from r1hpc.plan.hours.workload import Workload
from r1hpc.plan.topology.gpus import UnknownGpuError, find_gpu

FOLDER = Path(__file__).resolve().parent / "published"
DATA_FILES = ("published_runs.csv", "vtrain_single_node_a100.csv", "classes.csv")
HELD_OUT = "held_out.csv"
"""Families that no fit sees, in the columns of published_runs.csv."""
SINGLE_NODE_FAMILY = "vtrain-single"
_TEAMS = {
    "mosaic-h100_80gb": "mosaic",
    "mosaic-a100_40gb": "mosaic",
    "vtrain-multi": "vtrain",
    SINGLE_NODE_FAMILY: "vtrain",
    "mpt": "mosaic",
}
"""Families measured with the same software by the same authors: left out together."""
_CODE_BASES = {
    "pythia": "gpt-neox",
    "neox": "gpt-neox",
    "megatron-sc21": "megatron",
    "mtnlg": "megatron",
    "mcore-h100": "megatron",
}
"""Families of one code base in versions years apart. A fork under a name of its own is another one."""
_VTRAIN_VOCABULARY = 51200
_FULL_RECOMPUTATION = 4 / 3


@dataclass(frozen=True)
class Published:
    """One row. MFU counts the full square of attention, no recomputation, against dense bf16 peaks."""

    id: str
    kind: str
    """The CSV's kind: pretrain_run, throughput_bench, ..."""
    family: str
    workload: Workload
    measured_mfu: float
    """Over the whole of the GPU-hours the row gives, whatever they contain."""
    hours_kind: str
    """`step`: a measured step; else ideal, elapsed or rounded, see published/README.md."""
    weight: float
    scored: bool
    verified: bool
    gpu_hours: float | None

    @property
    def is_run(self) -> bool:
        return self.kind != "throughput_bench"

    @property
    def team(self) -> str:
        return _TEAMS.get(self.family, self.family)

    @property
    def code_base(self) -> str:
        return _CODE_BASES.get(self.family, self.team)

    @property
    def is_long(self) -> bool:
        """Its hours contain what goes wrong in weeks."""
        return self.hours_kind in ("elapsed", "rounded")

    @property
    def step_mfu(self) -> float:
        """measured_mfu with the goodput that default failure rates give taken out."""
        if not self.is_long:
            return self.measured_mfu
        return self.measured_mfu / overhead(FailureRates(), num_gpus_of(self.workload)).goodput


Group = Callable[[Published], str]
"""Names what a row is left out together with."""


def by_team(row: Published) -> str:
    return row.team


def by_code_base(row: Published) -> str:
    return row.code_base


@dataclass(frozen=True)
class _Class:
    """A line of classes.csv."""

    hours: str = "step"
    fit: float = 1.0
    scored: bool = True
    supplement: Mapping[str, str] | None = None


def read_table(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(newline="") as file:
        return list(csv.DictReader(file))


def read_published() -> list[Published]:
    """Every row that gives params, tokens or a rate, and a GPU that is known; the rest teaches no MFU."""
    classes = dict(_read_classes())
    found = (_published(row, classes.get(row["id"], _Class())) for row in read_table("published_runs.csv"))
    return [row for row in found if row is not None] + list(_read_single_node())


def read_held_out() -> list[Published]:
    found = (_published(row, _Class()) for row in read_table(HELD_OUT))
    return [row for row in found if row is not None]


def _read_classes() -> Iterator[tuple[str, _Class]]:
    for row in read_table("classes.csv"):
        pairs = (item.split("=") for item in row["supplement"].split(";") if item)
        yield row["id"], _Class(row["hours"], float(row["fit"]), row["score"] == "yes", dict(pairs))


def _published(row: Mapping[str, str], known: _Class) -> Published | None:
    if row["kind"] not in ("pretrain_run", "throughput_bench", "projection"):
        return None
    row = {**row, **(known.supplement or {})}
    work = workload_of(row)
    mfu = _measured_mfu(row, work) if work else None
    if work is None or mfu is None:
        return None
    return Published(
        id=row["id"],
        kind=row["kind"],
        family=row["family"],
        workload=work,
        measured_mfu=mfu,
        hours_kind=known.hours,
        weight=known.fit,
        scored=known.scored and row["kind"] != "projection",
        verified=row["verified"] == "yes",
        gpu_hours=_number(row["gpu_hours"]),
    )


def workload_of(row: Mapping[str, str]) -> Workload | None:
    """The workload of a CSV row; None where its GPU or its size is not known. Rates count one token."""
    try:
        gpu = find_gpu(row["gpu"])
    except UnknownGpuError:
        return None
    layout = row["parallelism"]
    gpus = _number(row["n_gpus"])
    layers, hidden = _shape_in(row["model"])
    return Workload.of_counts(
        params=float(row["params"]),
        active_params=_number(row["params_active"]),
        tokens=_number(row["tokens"]) or 1.0,
        seq_len=int(_number(row["seq_len"]) or 2048),
        layers=layers,
        hidden_size=hidden,
        gpu=gpu,
        num_gpus=int(gpus) if gpus else None,
        tokens_per_step=_number(row["global_batch_tokens"]),
        micro_batch_size=_number(row["micro_batch"]),
        precision=row["precision"].removeprefix("amp_") or "bf16",
        recompute=row["act_ckpt"] or None,
        zero_stage=_zero_stage(layout),
        offload="offload" in layout,
        tensor_parallel=_ways(layout, "TP"),
        pipeline_parallel=_ways(layout, "PP"),
        stack=row["stack"] or None,
    )


def _measured_mfu(row: Mapping[str, str], work: Workload) -> float | None:
    if row["kind"] != "throughput_bench":
        hours = _number(row["gpu_hours"])
        return work.gpu_hours_at(1.0) / hours if hours and row["tokens"] else None
    rate = _number(row["tokens_per_s_per_gpu"])
    if rate is not None:
        return rate * work.flops_per_token / work.gpu.peak_flops
    given = _number(row["mfu_pct"])
    if given is not None:
        # A row that counts half the scores gives less than the same speed in our convention.
        return given / 100 / (1 - work.attention_share / 2 if row.get("attention") == "causal" else 1)
    tflops = _number(row["tflops_per_gpu"])
    counted = _FULL_RECOMPUTATION if row["hfu_pct"] or row["act_ckpt"] == "full" else 1.0
    return None if tflops is None else tflops / work.gpu.peak_tflops / counted


def _read_single_node() -> Iterator[Published]:
    """vTrain's small models on at most eight GPUs. Columns are named in the file's first line."""
    gpu = find_gpu("A100-SXM4-80GB")
    for index, row in enumerate(read_table("vtrain_single_node_a100.csv")):
        gpus, batch, micro, hidden, _, layers, seq_len, tensor, _, stages = map(int, list(row.values())[:10])
        tokens = batch * seq_len
        work = Workload.of_counts(
            params=12 * layers * hidden**2 + (_VTRAIN_VOCABULARY + seq_len) * hidden,
            tokens=tokens,
            seq_len=seq_len,
            layers=layers,
            hidden_size=hidden,
            gpu=gpu,
            num_gpus=gpus,
            tokens_per_step=tokens,
            micro_batch_size=micro,
            precision="fp16",
            tensor_parallel=tensor,
            pipeline_parallel=stages,
            stack="megatron",
        )
        step_s = float(row["iteration time (ms)"]) / 1e3
        mfu = work.flops / (step_s * gpus * gpu.peak_flops)
        name = f"{SINGLE_NODE_FAMILY}-{index}"
        yield Published(
            name, "throughput_bench", SINGLE_NODE_FAMILY, work, mfu, "step", 1.0, True, True, None
        )


def _number(text: str) -> float | None:
    return float(text) if text else None


def _shape_in(model: str) -> tuple[int | None, int | None]:
    found = re.search(r"\(L(\d+) h(\d+)\)", model)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _ways(layout: str, kind: str) -> int | None:
    found = re.search(rf"{kind}(\d+)", layout)
    return int(found[1]) if found else None


def _zero_stage(layout: str) -> int | None:
    marks = (("FULL_SHARD", 3), ("SHARD_GRAD_OP", 2), ("ZeRO-3", 3), ("ZeRO-2", 2), ("ZeRO-1", 1), ("DDP", 0))
    return next((stage for mark, stage in marks if mark in layout), None)


def in_groups(rows: Iterable[Published], group: Group) -> list[str]:
    """The groups that there are, in the order of the rows."""
    return list(dict.fromkeys(group(row) for row in rows))
