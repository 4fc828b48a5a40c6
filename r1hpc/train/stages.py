"""From a stage's name to the program of its ranks."""

from r1hpc.train.loop import Job, Outcome


def run(job: Job) -> Outcome:
    """Run the stage of the configuration on this rank."""
    # Each is imported only where it runs: the tasks of RL and the reader of shards need not be there for all.
    match job.config.stage:
        case "pretrain":
            from r1hpc.train import pretrain

            return pretrain.run(job)
        case "sft":
            from r1hpc.train import sft

            return sft.run(job)
        case "rl":
            from r1hpc.train import rl

            return rl.run(job)
        case "traces":
            from r1hpc.train import traces

            return traces.run(job)
        case "generate":
            from r1hpc.train import generate

            return generate.run(job)
        case _:
            from r1hpc.train import evaluation

            return evaluation.run(job)
