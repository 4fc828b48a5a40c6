"""A ninth stage that trains, in one file as another package would add it."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from r1hpc.attempt.workload import Outcome, RankJob, Workload
from r1hpc.client.stage import StageRun
from r1hpc.config.load import options_of
from r1hpc.config.schema.ranges import ranged
from r1hpc.config.schema.run import RunConfig


@dataclass(frozen=True)
class Options:
    steps: int = ranged(60, least=1)
    rate: float = ranged(0.1, above=0.0, most=1.0)
    pause_s: float = ranged(0.0, least=0.0)


class Weight:
    value = 1.0

    def save(self, folder: Path) -> None:
        (folder / "weight.json").write_text(json.dumps(self.value))

    def load(self, folder: Path) -> None:
        self.value = json.loads((folder / "weight.json").read_text())


class Descending(Workload):
    counts, options = "steps", Options

    def steps(self, config: RunConfig) -> int:
        steps: int = options_of(config).steps
        return steps

    def shortened(self, config: RunConfig, num_steps: int) -> list[str]:
        return [f"options.steps={num_steps}"]

    def run(self, job: RankJob) -> Outcome:
        run, weight, options = StageRun(job), Weight(), job.options
        run.resume(weight)
        for step in run.steps(options.steps, state=weight):
            weight.value *= 1 - options.rate / step
            time.sleep(options.pause_s)
            run.log(loss=weight.value, lr=options.rate)
            run.used(1, step - 1, step)
        return run.outcome


WORKLOAD = Descending()
