"""Saves after every step by r1hpc.client, without torch; checks what it loads."""

from pathlib import Path

from r1hpc import attempt

_FILES = 3
_BYTES = 300_000


class Blob:
    """Files whose content tells the step."""

    step = 0

    def save(self, folder: Path) -> None:
        for number in range(_FILES):
            (folder / f"part-{number}").write_bytes(str(self.step % 10).encode() * _BYTES)

    def load(self, folder: Path) -> None:
        self.step = int(folder.name.rpartition("-")[2])
        for number in range(_FILES):
            assert (folder / f"part-{number}").read_bytes() == str(self.step % 10).encode() * _BYTES


run, state = attempt(), Blob()
run.resume(state)
for step in run.steps(1_000_000, save_every=1, state=state):
    state.step = step
    run.log(loss=1.0 / step)
