"""A quantised export, measured beside its original.

report = export_measured(config, Path("runs/r1/grpo/model"), Path("int8"), Asked("int8"))
report.verdict.no_worse, report.to_json()
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1hpc.base.files import write_json
from r1hpc.config.schema import RunConfig
from r1hpc.tasks.comparison import Comparison, compare_answers
from r1hpc.tasks.no_worse import Verdict, judge_loss
from r1hpc.train.measure import Measured, open_bench
from r1hpc.train.quantize import Quantized, quantize

RECORD = "r1hpc-quantization.json"
"""What was measured, in the folder of the export."""


@dataclass(frozen=True)
class Asked:
    """How to quantise, and how to measure."""

    scheme: str
    """A key of quantize.SCHEMES."""
    num_texts: int = 0
    """To calibrate on; 0: no calibration."""
    num_questions: int | None = None
    """None: as many as the run evaluates on."""
    margin: float = 0.02
    """The loss of accuracy that is to be excluded, as a share of the questions."""


@dataclass(frozen=True)
class Report:
    """Original and export, side by side."""

    asked: Asked
    questions: str
    """The task or the test files that they are of."""
    quantized: Quantized
    before: Measured
    after: Measured
    comparison: Comparison
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Without the answers."""
        found = self.comparison
        return {
            **asdict(self.asked),
            **asdict(self.quantized),
            "original": _figures(self.before),
            "export": _figures(self.after),
            "questions": self.questions,
            "num_questions": found.num_questions,
            "accuracy": asdict(found.accuracy),
            "p_value": found.p_value,
            "no_worse": self.verdict.no_worse,
            "verdict": self.verdict.text,
        }


def export_measured(
    config: RunConfig,
    source: Path,
    folder: Path,
    asked: Asked,
    code: Path | None = None,
) -> Report:
    """Quantise the model of `source` into `folder`, read it back, and ask both the questions of a run.

    Args:
        config, code: see measure.open_bench.

    Raises:
        UsageError: see quantize and open_bench.
    """
    with open_bench(config, source, code, asked.num_questions) as bench:
        texts = bench.training_texts(asked.num_texts) if asked.num_texts else None
        _say(f"making the weights {asked.scheme}" + (f", calibrated on {len(texts)} texts" if texts else ""))
        quantized = quantize(source, folder, asked.scheme, texts, bench.device)
        _say("asking the original")
        before = bench.measure(source)
        _say("asking the export")
        after = bench.measure(folder)
    comparison = compare_answers(before.answers, after.answers)
    verdict = judge_loss(comparison, asked.margin)
    report = Report(asked, bench.questions, quantized, before, after, comparison, verdict)
    write_json(folder / RECORD, report.to_json())
    return report


def _figures(measured: Measured) -> dict[str, Any]:
    return {key: value for key, value in asdict(measured).items() if key != "answers"}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
