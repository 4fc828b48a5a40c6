"""A ninth stage in one file, as another package would add it: every rank counts, and goes on where it was."""

import json
import time

from r1hpc.attempt.workload import Checked, Facts, Outcome, RankJob, Workload
from r1hpc.base.errors import UsageError
from r1hpc.base.files import write_json
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import RunConfig


class Counting(Workload):
    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        if not isinstance(config.options.get("count"), int):
            raise UsageError("stage counting needs options.count=N, how far each rank counts")
        return Checked(config, [f"each rank counts to {config.options['count']}"])

    def run(self, job: RankJob) -> Outcome:
        state = job.run.path / f"counted-{job.context.rank}.json"
        number = json.loads(state.read_text())["number"] if state.exists() else 0
        if [job.config.options["count"], job.config.train.seed] == job.config.options.get("bad"):
            raise RuntimeError("a bad setting")
        while number < job.config.options["count"]:
            if job.requests.poll()[0]:
                return Outcome(False, reason=job.requests.reason, kept=number)
            number += 1
            time.sleep(job.config.options.get("pause_s", 0.01))
            write_json(state, {"number": number, "attempt": job.context.attempt})
            job.watchdog.beat(f"counted to {number}")
        return Outcome(True, kept=number)

    def card(self, run: RunDir) -> list[tuple[str, str]]:
        counted = [json.loads(file.read_text())["number"] for file in sorted(run.path.glob("counted-*.json"))]
        return [("counted", ", ".join(map(str, counted)))]


WORKLOAD = Counting()
