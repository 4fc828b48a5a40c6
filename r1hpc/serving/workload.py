"""Serve a model behind OpenAI's interface as a job: the serving workload."""

from r1hpc.attempt.workload import Checked, Facts, Outcome, RankJob, Workload
from r1hpc.config.schema.run import RunConfig


class Serving(Workload):
    """One server on one node."""

    def vocab_size(self, config: RunConfig) -> int | None:
        from r1hpc.base.errors import UsageError
        from r1hpc.tasks.text.tokenizer import load_tokenizer, vocabulary_size  # tokenizers

        try:
            return vocabulary_size(load_tokenizer(config.model))
        except UsageError:  # refused later, when it is needed
            return None

    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        from r1hpc.serving.checks import check_named

        check_named(config)
        return Checked(config)

    def check(self, config: RunConfig, facts: Facts) -> list[str]:
        from r1hpc.serving.checks import check_served

        if facts.expected_model is None:
            check_served(config, facts.gpus_per_node, facts.executor)
        return []

    def run(self, job: RankJob) -> Outcome:
        from r1hpc.serving.life import serve

        return serve(job)


SERVING = Serving()
