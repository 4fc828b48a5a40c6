"""Tell the user that a run is over: a webhook, or a command such as mail.

    notify(run, config.notify, "failed", "attempt 2 ended: crash")

It never fails a run, and waits ten seconds at most.
"""

import json
import subprocess
import sys
import urllib.request
from threading import Thread

from r1hpc.base.choose_run import full_name
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import NotifyConfig

_LONGEST_S = 10.0


def notify(run: RunDir, config: NotifyConfig, state: str, detail: str) -> None:
    """Send the message by every configured way. A way that fails prints a line."""
    text = f"{full_name(run)}: {state}" + (f" ({detail})" if detail else "")
    message = {
        "text": text,
        "run": full_name(run),
        "state": state,
        "detail": detail,
        "run_dir": str(run.path),
    }
    senders = []
    if config.url is not None:
        senders.append(Thread(target=_post, args=(config.url, message), daemon=True))
    if config.command is not None:
        senders.append(Thread(target=_run, args=(config.command, text), daemon=True))
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(_LONGEST_S)


def _post(url: str, message: dict[str, str]) -> None:
    body = json.dumps(message).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=_LONGEST_S).close()
    except (OSError, ValueError) as error:  # not the URL: it may hold a secret
        print(f"notify.url did not take the message: {error}", file=sys.stderr, flush=True)


def _run(command: str, text: str) -> None:
    try:
        shell = ["/bin/sh", "-c", command]
        subprocess.run(shell, input=f"{text}\n", text=True, timeout=_LONGEST_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"notify.command failed: {error}", file=sys.stderr, flush=True)
