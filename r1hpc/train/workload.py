"""Define the training workload: pretrain, traces, sft, rl, rollout, generate, evaluate.

It runs in three places: the login node checks and estimates, the batch host prepares the dataset, the ranks
train. Each imports only what it needs, so imports stand inside the methods.
"""

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r1hpc.attempt.workload import Checked, Facts, Outcome, RankJob, Workload
from r1hpc.base.errors import UsageError
from r1hpc.base.files import read_object
from r1hpc.base.run_dir import RunDir
from r1hpc.config import load
from r1hpc.config.schema.run import RunConfig

if TYPE_CHECKING:
    from r1hpc.plan.hours.estimate import Estimate
    from r1hpc.plan.hours.goodput import FailureRates
    from r1hpc.plan.run import RunPlan

_MOST_ENCODED = 5000
"""Prompts whose tokens are counted, the longest ones: a second or two."""


class Training(Workload):
    """Everything that trains a model or samples from one."""

    packages = ("torch", "deepspeed", "transformers", "zarr", "google_crc32c")

    def __init__(self, counts: Literal["steps", "parts", ""], samples: bool) -> None:
        self.counts, self.samples = counts, samples
        self.trains = counts == "steps"
        self.loads_model = self.trains or samples

    def steps(self, config: RunConfig) -> int | None:
        return config.train.num_steps if self.counts == "steps" else None

    def shortened(self, config: RunConfig, num_steps: int) -> Sequence[str]:
        return (
            [f"train.num_steps={num_steps}"] if self.steps(config) else super().shortened(config, num_steps)
        )

    def complete(self, config: RunConfig) -> RunConfig:
        """Fill in the number of questions of each test file, if the stage uses any."""
        if config.stage not in ("rl", "evaluate") or not (config.evaluate.path or config.evaluate.sets):
            return config
        from r1hpc.tasks.problems.benchmark import with_counted_sets  # pyarrow

        return with_counted_sets(config)

    def vocab_size(self, config: RunConfig) -> int | None:
        if config.stage == "traces":
            return None
        if config.stage == "pretrain":
            from r1hpc.corpus.recipe import find_recipe, load_recipe
            from r1hpc.data.format.manifest import read_manifest

            if config.data.path is not None:
                found: int = read_manifest(Path(config.data.path)).content["vocab_size"]
                return found
            recipe = config.data.recipe
            # A byte-level BPE can end up smaller, if the text has too few pairs.
            return None if recipe is None else load_recipe(find_recipe(recipe)).tokenizer.vocab_size
        from r1hpc.tasks.text.tokenizer import load_tokenizer, vocabulary_size  # tokenizers

        try:
            return vocabulary_size(load_tokenizer(config.model))
        except UsageError:  # an earlier stage will write it, or a later check refuses it
            return None

    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        from r1hpc.tasks.problems.benchmark import check_trained_on
        from r1hpc.train.checks.data import check_mix_goes_on, check_sources, check_training_data
        from r1hpc.train.checks.model import check_models, check_zero_goes_on, tokenizer_is_to_come
        from r1hpc.train.checks.off_policy import check_off_policy, files_of_the_record
        from r1hpc.train.checks.workers import check_workers

        notes: list[str] = []
        expected = facts.expected_model
        if facts.frozen is None:
            notes = check_models(config, expected, facts.expected_teacher)
            if config.stage == "rl":
                check_off_policy(config)
                check_workers(config)
                notes += files_of_the_record(config)
            to_come = tokenizer_is_to_come(config, expected)
            is_given = bool(config.data.path or config.data.traces)
            if config.stage == "sft" or (config.stage == "pretrain" and is_given):
                notes += check_training_data(config, facts.to_come, tokenizer_to_come=to_come)
            if config.evaluate.trained_on or config.evaluate.not_searched:
                check_trained_on(config, facts.to_come)
            config = self.complete(config)
        else:  # it continues from its checkpoints
            check_mix_goes_on(facts.frozen, config)
            if config.rollout.vllm_options != facts.frozen.rollout.vllm_options:
                config.rollout.check_new()
            check_zero_goes_on(facts.run, config)
        if config.data.mix.schedule:
            check_sources(config, facts.to_come)
        asked = config
        if expected is not None and facts.tokenizer_folder is not None:  # a copy is here already
            asked = replace(config, model=replace(config.model, path=facts.tokenizer_folder))
            expected = None
        repeats, prompt = self._check_questions(asked, facts, tokenizer_is_to_come(asked, expected))
        return Checked(config, [*repeats, *notes], prompt)

    def _check_questions(
        self, config: RunConfig, facts: Facts, tokenizer_to_come: bool
    ) -> tuple[list[str], str | None]:
        """Check task, rewards and tokenizer, which the ranks would only find faulty on the nodes. Return
        notes on questions that are used again, and one prompt as the model will see it."""
        if config.stage == "sft" and not tokenizer_to_come:
            from r1hpc.tasks.text import tokenizer

            tokenizer.special_ids(tokenizer.load_tokenizer(config.model), config.model, facts.code)
        if config.stage not in ("traces", "rl", "generate", "evaluate"):
            return [], None
        from r1hpc.tasks.text import tokenizer  # tokenizers
        from r1hpc.tasks.text.format import prompt_ids
        from r1hpc.tasks.try_out import check_questions

        notes: list[str] = []
        fits = None if tokenizer_to_come else tokenizer.fitting(config, facts.code)
        items = check_questions(config, facts.code, notes.append, fits)
        if config.stage == "traces" or tokenizer_to_come:
            return notes, None
        own = tokenizer.load_tokenizer(config.model)
        form = tokenizer.form_of(own, config.model, facts.code)
        # The longest text does not always have the most tokens.
        wheres = {item.prompt: item.where for item in reversed(items)}
        for prompt in heapq.nlargest(_MOST_ENCODED, wheres, key=len):
            prompt_ids(own, form, prompt, wheres[prompt], config.rollout.max_prompt_length)
        if not items:
            return notes, None
        prompt = form.prompt(items[0].prompt)
        # A template may escape or strip the question; its longest piece of plain words must still be there.
        words = max(re.findall(r"[\w ]+", items[0].prompt), key=len, default="").strip()
        if words not in prompt:
            raise UsageError(
                f"the chat template leaves the question out: {words!r:.80} is not in {prompt!r:.120}. "
                "Set model.chat_template to one that shows messages[...].content, or to none"
            )
        return notes, prompt

    def check(self, config: RunConfig, facts: Facts) -> list[str]:
        from r1hpc.plan.topology.checks import check_layout, check_new_precision
        from r1hpc.train.checks.data import refuse_long_build
        from r1hpc.train.checks.model import other_tokenizer, seldom_meant

        check_layout(config)
        if facts.is_new:
            check_new_precision(config)
        if facts.is_new and facts.executor == "slurm" and facts.gpus_per_node:
            refuse_long_build(facts.run, config)
        notes = other_tokenizer(config) if config.model.tokenizer is not None else []
        return [*notes, *(seldom_meant(config, facts.others) if facts.is_new else ())]

    def connect(self, name: str, config: RunConfig, earlier: Mapping[str, RunConfig]) -> RunConfig:
        from r1hpc.train.checks.data import connected

        return connected(name, config, earlier)

    def estimate(
        self,
        config: RunConfig,
        plan: "RunPlan",
        rates: "FailureRates | None" = None,
        expected_model: Mapping[str, Any] | None = None,
        run_root: Path | None = None,
    ) -> "Estimate | None":
        from r1hpc.plan.hours.estimate_run import estimate_of_run

        return estimate_of_run(config, plan, rates, expected_model)

    def prepare(self, run: RunDir, config: RunConfig) -> str:
        """Build the dataset if it is missing; return its folder."""
        if config.stage not in ("pretrain", "sft"):
            return ""
        from r1hpc.train.supervised.dataset import ensure_dataset

        return str(ensure_dataset(run, config))

    def card(self, run: RunDir) -> list[tuple[str, str]]:
        """Return the accuracy of the newest evaluation, greedy and sampled."""
        from r1hpc.telemetry.records.evaluations import results

        return results(run)

    def run(self, job: RankJob) -> Outcome:
        from r1hpc.train.rank import run_rank

        return run_rank(job)


class Rollout(Training):
    """A worker that samples for a run of stage rl."""

    def check_settings(self, config: RunConfig, facts: Facts) -> Checked:
        from r1hpc.train.checks.workers import with_trainers_settings

        return Checked(with_trainers_settings(config, facts.run.run_id) if facts.is_new else config)

    def check(self, config: RunConfig, facts: Facts) -> list[str]:
        from r1hpc.train.checks.workers import refuse_several_ranks

        refuse_several_ranks(config, facts.gpus_per_node)
        return []

    def estimate(self, *_: Any, **__: Any) -> None:
        """Return None: it samples as long as its trainer trains."""

    def card(self, run: RunDir) -> list[tuple[str, str]]:
        """Return how many groups it has delivered, and with which version of the weights it samples."""
        from r1hpc.train.exchange.mailbox import read_beat, read_boxes

        trainer = RunDir(load.read(run.config).workers.trainer or "")
        boxes = read_boxes(trainer.workers / run.run_id)
        beat = read_beat(boxes[-1]) if boxes else None
        if beat is None:
            return [("groups delivered", f"none on file in {trainer.workers / run.run_id}")]
        newest, loaded = read_object(trainer.exchange / "latest.json").get("version"), beat["version"]
        behind = f", {newest - loaded} behind" if isinstance(newest, int) else ""
        version = f"{loaded}{behind}" if loaded >= 0 else "none yet"
        return [("groups delivered", f"{beat['committed']:,}"), ("version", version)]


SUPERVISED = Training("steps", samples=False)
RL = Training("steps", samples=True)
ROLLOUT = Rollout("", samples=True)
TRACES = Training("parts", samples=False)
SAMPLING = Training("parts", samples=True)
