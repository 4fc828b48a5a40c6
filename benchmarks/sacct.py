"""GPU-hours of a million records of sacct: time, memory and error beside plain reads and beside peers.

    python benchmarks/sacct.py [--records 1000000] [--rounds 3] [--peers PYTHON] [--peer-records 100000]

The dump is made from a seed, with requeues, arrays, heterogeneous jobs, records that stand there twice and
job names that hold the separator; what it adds up to is known by construction (tests/accounting/dumps.py).
Ours is the whole process of `python -m r1hpc.report --sacct-file FILE --json`. It takes turns with three that
do less:

    split        a loop over the lines that splits each, and nothing else
    plain read   the same loop with the ten columns that ours reads, job names put together, and one sum: the
                 GPU-hours of all lines, those that stand there twice too
    Arrow read   the same by pyarrow.csv.open_csv; rows whose name holds the separator come by its handler

Ours must be exact in every breakdown, within 150 MiB, and within 1.2 times the plain read: of CPU time, which
on an idle core is its wall time, for the machine may be busy. `odd` is ours on a second dump: three clusters
with the same job IDs, MIG slices, shards, MPS and rows that cannot be read. It must be exact too.

Peers are measured on fewer records, for they are slow, where PYTHON (this one unless named) has them: pip
install slurm2sql slurm-usage pandas. They are called as libraries, as their commands call themselves; both
ask sacct for what they want, so each is given lines with its own columns.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_MIB = 150
MOST_RATIO = 1.2
COLUMNS = (
    "JobID", "User", "Account", "Partition", "QOS", "State", "Start", "ElapsedRaw", "NNodes", "AllocTRES",
)  # fmt: skip
PLAIN = {"split": "split", "plain": "plain read", "arrow": "Arrow read"}
OURS = {"ours": "r1hpc report"}
PEERS = ("pandas", "slurm2sql", "slurm-usage")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="an interpreter with them")
    parser.add_argument("--peer-records", type=int, default=100_000)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        name, path = arguments.run
        print(json.dumps(PROGRAMS[name](Path(path))))
        return 0
    os.environ["TZ"] = "Europe/Berlin"  # two days of the year have not 24 hours
    time.tzset()
    with tempfile.TemporaryDirectory() as folder:
        status = compare_with_plain_reads(Path(folder) / "dump.txt", arguments.records, arguments.rounds)
        compare_with_peers(Path(folder) / "few.txt", arguments.peer_records, arguments.peers)
    return status


def compare_with_plain_reads(path: Path, records: int, rounds: int) -> int:
    """Print ours beside the plain reads; 1 if it misses its target."""
    truth = make_dump(path, records)
    print(
        f"{records:,} lines, {path.stat().st_size / 2**20:.0f} MiB, {truth.num_records:,} records that count"
    )
    options = ["--sacct-file", str(path), "--json", "--run-root", str(path.parent / "none")]
    argvs = {name: [sys.executable, __file__, "--run", name, str(path)] for name in PLAIN}
    argvs["ours"] = [sys.executable, "-m", "r1hpc.report", *options]
    found: dict[str, list[Measured]] = {name: [] for name in argvs}
    for _ in range(rounds):
        for name, argv in argvs.items():
            found[name].append(measure(argv))
    cpu_s = {name: min(m.cpu_s for m in measured) for name, measured in found.items()}
    mib = {name: max(m.mib for m in measured) for name, measured in found.items()}
    wrong = differences(json.loads(found["ours"][0].output)["gpu_hours"], truth)
    print_row("", "wall s", "CPU s", "MiB", "ours / it", "error")
    for name, measured in found.items():
        wall_s, ratio = min(m.wall_s for m in measured), cpu_s["ours"] / cpu_s[name]
        shown = (f"{wall_s:.2f}", f"{cpu_s[name]:.2f}", f"{mib[name]:.0f}", f"{ratio:.2f}")
        print_row((PLAIN | OURS)[name], *shown, f"{len(wrong)} sums" if name == "ours" else "")
    ratio = cpu_s["ours"] / cpu_s["plain"]
    print(f"targets: {MOST_RATIO} times the plain read, {MOST_MIB} MiB, no error")
    for line in wrong[:10]:
        print(f"  WRONG {line}")
    wrong += check_odd(path.parent / "odd.txt", records)
    return 1 if wrong or mib["ours"] > MOST_MIB or ratio > MOST_RATIO else 0


def check_odd(path: Path, records: int) -> list[str]:
    """Print how ours does on three clusters with parts of GPUs and bad rows; return the wrong sums."""
    from tests.accounting.dumps import ODD_COLUMNS, SHARES, UNIT, write_dump

    truth = write_dump(path, records, seed=2, columns=ODD_COLUMNS, odd=True)
    shares = ",".join(f"{kind}={count}" for kind, count in SHARES.items())
    options = ["--sacct-file", str(path), "--json", "--gres-per-gpu", shares]
    ours = measure([sys.executable, "-m", "r1hpc.report", *options, "--run-root", str(path.parent / "none")])
    hours = json.loads(ours.output)["gpu_hours"]
    print_row("odd", f"{ours.wall_s:.2f}", f"{ours.cpu_s:.2f}", f"{ours.mib:.0f}")
    wrong = differences(hours, truth, UNIT)
    if hours["set_aside"]["rows"] != truth.num_bad:
        wrong.append(f"{hours['set_aside']['rows']} rows set aside, {truth.num_bad} are bad")
    print(f"odd: {truth.num_records:,} records, {truth.num_bad:,} bad rows; {len(wrong)} sums are wrong")
    return wrong


def compare_with_peers(path: Path, records: int, python: str) -> None:
    truth = make_dump(path, records)
    print(f"\npeers on {records:,} lines")
    command = [sys.executable, "-m", "r1hpc.report", "--sacct-file", str(path), "--json"]
    ours = measure([*command, "--run-root", str(path.parent / "none")])
    print_row("", "wall s", "CPU s", "MiB", "error")
    found = json.loads(ours.output)["gpu_hours"]["total"] * 3600
    print_peer("r1hpc report", ours, found, truth.gpu_seconds)
    for name in PEERS:
        try:
            measured = measure([python, __file__, "--run", name, str(path)])
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:]
            print(f"{name:14} {''.join(last)[:90]}")
            continue
        print_peer(name, measured, json.loads(measured.output), truth.gpu_seconds)


class Measured:
    """One process, from its start to its end."""

    def __init__(self, output: str, wall_s: float, cpu_s: float, mib: float) -> None:
        self.output, self.wall_s, self.cpu_s, self.mib = output, wall_s, cpu_s, mib


def measure(argv: list[str]) -> Measured:
    """Run it.

    Raises:
        CalledProcessError: it failed; holds what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.perf_counter()
        process = subprocess.Popen(argv, env=environment, stdout=out, stderr=err, text=True)
        _, status, used = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if status:
            raise subprocess.CalledProcessError(process.returncode, argv, out.read(), err.read())
        return Measured(out.read(), wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def make_dump(path: Path, records: int) -> Any:
    sys.path.insert(0, str(ROOT))
    from tests.accounting.dumps import write_dump

    return write_dump(path, records, seed=1)


def differences(hours: dict[str, Any], truth: Any, unit: int = 1) -> list[str]:
    """Every sum that is not the one by construction, to the second."""
    found = {("total", ""): hours["total"], ("node", ""): hours["node_hours"]}
    expected = {("total", ""): truth.gpu_seconds, ("node", ""): truth.node_seconds}
    for key, sums in truth.by.items():
        expected |= {(key, name): seconds for name, seconds in sums.items()}
        found |= {(key, name): value for name, value in hours[f"by_{key}"].items()}
    scale = {key: 3600 * (1 if key == ("node", "") else unit) for key in found}
    both = {
        key: (found.get(key, 0) * scale.get(key, 0), expected.get(key, 0))
        for key in expected.keys() | found.keys()
    }
    return [
        f"{group} {name}: {ours} s, by construction {true}"
        for (group, name), (ours, true) in sorted(both.items())
        if round(ours) != true
    ]


def print_row(*cells: str) -> None:
    print(f"{cells[0]:14}" + "".join(f"{cell:>10}" for cell in cells[1:]))


def print_peer(name: str, measured: Measured, found: float, expected: int) -> None:
    error = f"{100 * (found - expected) / expected:+.1f} %"
    print_row(name, f"{measured.wall_s:.2f}", f"{measured.cpu_s:.2f}", f"{measured.mib:.0f}", error)


def run_split(path: Path) -> int:
    """Cells of the file."""
    with path.open() as file:
        return sum(len(line.split("|")) for line in file)


def run_plain(path: Path) -> int:
    """GPU-seconds of all lines."""
    total, gpus = 0, cache(gpus_in)
    with path.open() as file:
        names = file.readline().rstrip("\n").split("|")
        count, name_at = len(names), names.index("JobName")
        pick = itemgetter(*map(names.index, COLUMNS))
        for line in file:
            cells = line.rstrip("\n").split("|")
            if len(cells) != count:
                end = name_at + 1 + len(cells) - count
                cells[name_at:end] = ["|".join(cells[name_at:end])]
            *_, elapsed, _, tres = pick(cells)
            total += gpus(tres) * int(elapsed)
    return total


def run_arrow(path: Path) -> int:
    """The same, by pyarrow.csv in batches."""
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    with path.open() as file:
        names = file.readline().rstrip("\n").split("|")
    others: list[list[str]] = []
    gpus = cache(gpus_in)

    def keep(row: Any) -> str:
        others.append(row.text.split("|"))
        return "skip"

    def add(tres: Any, elapsed: list[int]) -> int:
        coded = tres.dictionary_encode()
        each = [gpus(text) for text in coded.dictionary.to_pylist()]
        return sum(each[code] * s for code, s in zip(coded.indices.to_pylist(), elapsed, strict=True))

    batches = arrow_csv.open_csv(
        path,
        arrow_csv.ReadOptions(use_threads=False),
        arrow_csv.ParseOptions(delimiter="|", quote_char=False, invalid_row_handler=keep),
        arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), include_columns=COLUMNS),
    )
    total = 0
    for batch in batches:
        total += add(batch["AllocTRES"], batch["ElapsedRaw"].cast(pa.int64()).to_pylist())
        tres, elapsed = (names.index(name) - len(names) for name in ("AllocTRES", "ElapsedRaw"))
        total += add(pa.array([row[tres] for row in others]), [int(row[elapsed]) for row in others])
        others.clear()
    return total


def gpus_in(tres: str) -> int:
    found = re.search(r"gres/gpu(?::\w+)?=(\d+)", tres)
    return int(found[1]) if found else 0


def run_pandas(path: Path) -> float:
    import pandas as pd  # type: ignore[import-not-found,import-untyped,unused-ignore]

    table = pd.read_csv(path, sep="|")
    gpus = table["AllocTRES"].fillna("").str.extract(r"gres/gpu=(\d+)")[0].fillna(0).astype(int)
    return float((gpus * table["ElapsedRaw"]).sum())


def run_slurm2sql(path: Path) -> float:
    import sqlite3

    import slurm2sql  # type: ignore[import-not-found,import-untyped,unused-ignore]

    names = [c for c in [*slurm2sql.COLUMNS, *slurm2sql.COLUMNS_EXTRA] if not c.startswith("_")]
    database = sqlite3.connect(":memory:")
    rows = (";|;".join(row.get(name, "") for name in names) for row in read_rows(path))
    lines = itertools.chain([";|;".join(names)], rows)
    slurm2sql.slurm2sql(database, raw_sacct=lines, update=True)  # without it a requeued job is an error
    return float(database.execute("select sum(NGpus * Elapsed) from slurm").fetchone()[0] or 0)


def run_slurm_usage(path: Path) -> float:
    import slurm_usage  # type: ignore[import-not-found,import-untyped,unused-ignore]

    fields = slurm_usage.RawJobRecord.get_field_names()
    lines = ("|".join(row.get(name, "") for name in fields) for row in read_rows(path))
    records = [slurm_usage.RawJobRecord.from_sacct_line(line, fields) for line in lines]
    jobs, _ = slurm_usage._process_raw_records_into_jobs([r for r in records if r is not None])
    return 3600 * float(sum(job.gpu_hours_reserved for job in jobs))


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The dump as a peer's own question would have got it: separators in names stay where they are."""
    from r1hpc.base.units import format_time

    with path.open() as file:
        names = file.readline().rstrip("\n").split("|")
        at = names.index("JobName")
        for line in file:
            cells = line.rstrip("\n").split("|")
            end = at + 1 + len(cells) - len(names)
            row = dict(zip(names, [*cells[:at], "|".join(cells[at:end]), *cells[end:]], strict=True))
            elapsed = format_time(int(row["ElapsedRaw"]))
            yield {**row, "JobIDRaw": re.split("[_+]", row["JobID"])[0], "Elapsed": elapsed}


PROGRAMS: dict[str, Callable[[Path], float]] = {
    "split": run_split,
    "plain": run_plain,
    "arrow": run_arrow,
    "pandas": run_pandas,
    "slurm2sql": run_slurm2sql,
    "slurm-usage": run_slurm_usage,
}

if __name__ == "__main__":
    sys.exit(main())
