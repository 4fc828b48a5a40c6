"""Tell from a number's name which way it is better, if the name leaves no doubt.

lower_is_better("eval_loss")   # True
lower_is_better("pass@1")      # False
lower_is_better("val")         # None: ask
"""

import re

from r1hpc.base.errors import UsageError
from r1hpc.base.names import printable

_LOWER = re.compile(r"loss|perplexity|ppl|nll|bpb|mse|rmse|mae|wer|cer|error")
_HIGHER = re.compile(r"accuracy|accuracies|acc|reward|greedy|f1|bleu|auc|auroc|mfu|(pass|maj|acc|recall)@\d+")
_EXACT = {"step_time_s": True, "data_time_s": True, "tokens_per_second": False}
_NEUTRAL = re.compile(r"train|training|eval|val|valid|validation|test|dev|epoch|step|mean|avg|\d+")
"""Words that may follow the one that decides, as in loss_epoch."""
_TURNS = re.compile(r"neg|negative|minus|inverse|inv|delta|diff|gap|drop|change|reduction|no|non")
"""Words that turn the meaning, or make it doubtful: neg_mean_squared_error is better if higher."""


def lower_is_better(name: str) -> bool | None:
    """Return True or False if the name leaves no doubt, else None."""
    if name in _EXACT:
        return _EXACT[name]
    words = [word for word in re.split(r"[^a-z0-9@]+", name.lower()) if word]
    while words and _NEUTRAL.fullmatch(words[-1]):
        words.pop()
    is_low, is_high = (any(map(kind.fullmatch, words)) for kind in (_LOWER, _HIGHER))
    decides = bool(words) and any(kind.fullmatch(words[-1]) for kind in (_LOWER, _HIGHER))
    return is_low if decides and is_low != is_high and not any(map(_TURNS.fullmatch, words)) else None


def direction(name: str, lower: bool | None) -> bool:
    """Return whether lower is better, as given or by the name. Raise UsageError if that is not known."""
    if lower is None:
        lower = lower_is_better(name)
    if lower is None:
        raise UsageError(f"is {printable(name)} better if lower or higher? Add --lower or --higher")
    return lower
