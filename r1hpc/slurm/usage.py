"""What sacct printed, read back: all records of a user, an account or a cluster, from a file or live.

    records = read_sacct(Path("sacct.txt").read_text(), "sacct.txt")
    records = ask_sacct(start="2026-05-01", user="ada")

A file is what `sacct -D -X -P -o ...` prints, header included, its columns in any order; needed are JobID,
Start, AllocTRES and one of ElapsedRaw, Elapsed, End. Without -D the earlier attempts of requeued jobs are
missing from it, and nothing in it tells.
"""

import re
from collections.abc import Mapping
from datetime import datetime

from r1hpc.base.errors import StateError, UsageError
from r1hpc.base.units import parse_time
from r1hpc.slurm.accounting import FIELDS, JobRecord, gpus_of
from r1hpc.slurm.client import call

_PRINTED_BY = f"sacct -D -X -P -o {FIELDS}"
_NO_LATER = 7_258_118_400.0
"""2200-01-01: a number beyond it is no time of a job."""
_LONGEST_S = 10 * 366 * 86400


def ask_sacct(
    start: str | None = None,
    end: str | None = None,
    user: str | None = None,
    account: str | None = None,
    timeout_s: float = 60.0,
) -> list[JobRecord]:
    """Records of all jobs of a user or an account; those of this user where neither is given.

    Args:
        start, end: as sacct takes them, for example 2026-05-01; sacct's own default is today.

    Raises:
        SlurmError: sacct or slurmdbd did not answer.
    """
    argv = ["sacct", "-D", "-X", "-P", "-o", FIELDS]
    options = {"-S": start, "-E": end, "-u": user, "-A": account}
    argv += [f"{flag}{value}" for flag, value in options.items() if value is not None]
    if account is not None and user is None:
        argv.append("--allusers")
    return read_sacct(call(argv, timeout_s), "sacct")


def read_sacct(text: str, source: str) -> list[JobRecord]:
    """The records in `text`, each once, in its order. Steps and jobs that never started are left out.

    Raises:
        StateError: the header or a line is not of this format; names `source`, line and fix.
    """
    lines = text.split("\n")  # splitlines() also splits at characters that a job name may hold
    header = lines[0] if lines else ""
    names = [name.strip().lower() for name in header.split("|")]
    _check_header(names, source)
    found: dict[tuple[str, float | None], JobRecord] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip() or line == header:  # files that were put one after the other
            continue
        place = f"{source}:{number}"
        try:
            record = _record(dict(zip(names, _split(line, names, place), strict=True)))
        except ValueError as error:
            raise StateError(f"{place}: {error}; make it again with: {_PRINTED_BY}") from None
        if record.start is not None and "." not in record.job_id:
            found[record.job_id, record.start] = record  # one attempt of a job starts once
    return list(found.values())


def parse_when(text: str) -> float | None:
    """Unix seconds of a time as sacct prints it: 2026-05-01T10:00:00 (local), or seconds; None if unset.

    Raises:
        UsageError: neither.
    """
    if text in ("", "Unknown", "None", "0"):
        return None
    try:
        seconds = float(text) if text.isdecimal() else datetime.fromisoformat(text).timestamp()
        if seconds < _NO_LATER:
            return seconds
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"{text!r} is not a time: write 2026-05-01 or 2026-05-01T10:00:00")


def _check_header(names: list[str], source: str) -> None:
    missing = [name for name in ("JobID", "Start", "AllocTRES") if name.lower() not in names]
    if not {"elapsedraw", "elapsed", "end"} & set(names):
        missing.append("ElapsedRaw")
    if missing:
        raise StateError(
            f"{source} has no column {', '.join(missing)} in its first line; make it with: {_PRINTED_BY}"
        )


def _split(line: str, names: list[str], place: str) -> list[str]:
    parts = line.split("|")
    surplus = len(parts) - len(names)
    if surplus > 0 and "jobname" in names:  # the one field whose text may hold the separator
        at = names.index("jobname")
        return [*parts[:at], "|".join(parts[at : at + surplus + 1]), *parts[at + surplus + 1 :]]
    if surplus:
        raise StateError(
            f"{place} has {len(parts)} fields and its header {len(names)}: torn or not from sacct -P"
        )
    return parts


def _record(row: Mapping[str, str]) -> JobRecord:
    start = parse_when(row["start"])
    end = parse_when(row.get("end", ""))
    return JobRecord(
        job_id=row["jobid"],
        state=(row.get("state") or "unknown").split(" ")[0],
        start=start,
        end=end,
        elapsed_s=_elapsed_s(row, start, end),
        gpus=gpus_of(row["alloctres"]),
        nodes=_nodes(row),
        node_list=row.get("nodelist", ""),
        exit_code=row.get("exitcode", ""),
        restarts=int(row.get("restarts") or 0),
        user=row.get("user", ""),
        account=row.get("account", ""),
        partition=row.get("partition", ""),
        qos=row.get("qos", ""),
        job_name=row.get("jobname", ""),
    )


def _elapsed_s(row: Mapping[str, str], start: float | None, end: float | None) -> int:
    if row.get("elapsedraw"):
        elapsed = int(row["elapsedraw"])
    elif row.get("elapsed"):
        elapsed = parse_time(row["elapsed"])
    else:
        elapsed = round(end - start) if start is not None and end is not None else 0
    if not 0 <= elapsed <= _LONGEST_S:
        raise ValueError(f"{elapsed} s is no time that a job ran")
    return elapsed


def _nodes(row: Mapping[str, str]) -> int:
    if row.get("nnodes"):
        return int(row["nnodes"])
    found = re.search(r"(?:^|,)node=(\d+)", row["alloctres"])
    return int(found[1]) if found else 0
