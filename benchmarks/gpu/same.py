"""Is a run the same to the bit as another of it, and as itself resumed? With the switch, or not."""

from collections.abc import Iterator

from benchmarks.gpu.place import Place, finished, wait_step, wait_until
from benchmarks.gpu.table import Table, number
from r1hpc.api import Run
from r1hpc.telemetry.records.metrics import compare, read_steps


def run(place: Place) -> list[Table]:
    switches = ("true",) if place.is_small else ("false", "true")
    stages = ("smoke",) if place.is_small else ("smoke", "rl_smoke")
    rows = [row for job in stages for switch in switches for row in _rows(place, job, switch)]
    header = (
        "job",
        "train.deterministic",
        "compared with the first run",
        "steps that differ",
        "first",
        "furthest",
    )
    notes = (
        "Steps differ where loss, gradient norm or rate are not the same double; furthest is the largest "
        "relative difference of a loss. Samples are the same in every case: they are a function of the step.",
    )
    return [Table("The same run twice, and resumed", header, tuple(rows), notes)]


def _rows(place: Place, job: str, switch: str) -> Iterator[tuple[str, ...]]:
    steps = 6 if place.is_small else 40
    words = (f"train.num_steps={steps}", f"train.deterministic={switch}", "checkpoint.save_every=1000")
    name = f"{job}-{'deterministic' if switch == 'true' else 'plain'}"
    first = place.run(f"{name}-a", *words, job=job)
    yield job, switch, "another run of it", *_differences(first, place.run(f"{name}-b", *words, job=job))
    yield job, switch, "stopped and resumed", *_differences(first, _stopped(place, f"{name}-c", words, job))


def _stopped(place: Place, name: str, words: tuple[str, ...], job: str) -> Run:
    """Saved and ended somewhere in the middle, then gone on with."""
    made = place.start(name, *words, job=job)
    wait_step(made, 2)
    made.cancel(save_first=True)
    wait_until(f"the end of {name}", lambda: made.state().is_over)
    if made.state().value != "finished":  # it may have been quicker
        made.resume(executor="local")
    return finished(made)


def _differences(a: Run, b: Run) -> tuple[str, str, str]:
    found = compare(a.folder, b.folder)
    steps = sorted({each.global_step for each in found})
    ours, theirs = read_steps(a.folder).effective, read_steps(b.folder).effective
    apart = [
        abs(left - right) / max(abs(left), 1e-12)
        for step in ours.keys() & theirs.keys()
        if (left := ours[step].loss) is not None and (right := theirs[step].loss) is not None
    ]
    return f"{len(steps)} of {len(ours)}", str(steps[0]) if steps else "-", number(max(apart, default=None))
