"""transformers' Trainer with its just-in-time checkpoint."""

import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.faults.jobs.small import BATCH, SAVE_EVERY, STEPS, Samples, Small, begin, finished, took


class Log(TrainerCallback):  # type: ignore[misc]
    """Tell the bench of each step."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        begin()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        took(state.global_step)


def newest(out: Path) -> str | None:
    """Return the newest complete checkpoint: the file that marks an unfinished one is documented."""
    complete = [path for path in out.glob("checkpoint-*") if not [*path.glob("*-is-incomplete.txt")]]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def main(out: Path) -> None:
    """Train, and leave `finished` in the folder: after a just-in-time checkpoint train() returns too."""
    job: Any = {"per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": 1e-2}
    quiet: Any = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1000}
    arguments = TrainingArguments(
        str(out), use_cpu=True, save_steps=SAVE_EVERY, enable_jit_checkpoint=True, **job, **quiet
    )
    model = Small()
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[Log()])
    trainer.train(resume_from_checkpoint=newest(out))
    if trainer.state.global_step >= STEPS:
        finished(model)
        (out / "finished").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
