"""Write out what a script has logged before its process ends without unwinding.

flush_logs()    # Run.leave calls it
"""

import gc
import io
import logging
import sys
import threading
from contextlib import suppress
from typing import Any

_LOGGED_S = 20.0
"""Seconds for W&B to send what it has; the checkpoint is committed before."""


def flush_logs() -> None:
    """Finish the W&B run; flush TensorBoard's writers, handlers of `logging` and open files."""
    thread = threading.Thread(target=_finish_wandb, daemon=True)
    thread.start()
    for each in gc.get_objects():
        with suppress(Exception):  # another's object, perhaps half built
            if _is_writer(each):
                each.flush()
    logging.shutdown()
    thread.join(_LOGGED_S)
    sys.stdout.flush()
    sys.stderr.flush()


def _is_writer(each: Any) -> bool:
    kind = type(each)  # isinstance would ask the object
    if kind in (io.TextIOWrapper, io.BufferedWriter):
        return not each.closed and bool(each.writable())
    return kind.__name__ == "SummaryWriter" and "tensorboard" in kind.__module__


def _finish_wandb() -> None:
    wandb: Any = sys.modules.get("wandb")
    with suppress(Exception):  # no network: its files stay, for `wandb sync`
        if wandb is not None and wandb.run is not None:
            wandb.finish()
