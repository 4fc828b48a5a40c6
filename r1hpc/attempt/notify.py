"""Tell the user that a run is over: a webhook, or a command such as mail.

It never fails a run, and waits ten seconds at most.
"""

import json
import subprocess
import sys
from threading import Thread

from r1hpc.base.choose_run import full_name
from r1hpc.base.errors import StateError
from r1hpc.base.files import check_owned
from r1hpc.base.run_dir import RunDir
from r1hpc.config.schema.run import NotifyConfig
from r1hpc.telemetry.records.attempts import Cause

_LONGEST_S = 10.0


def notify(run: RunDir, config: NotifyConfig, cause: Cause, detail: str) -> None:
    """Send the message by every configured way. A way that fails prints a line."""
    try:
        check_owned(run.path.resolve())  # its settings name a command
    except (StateError, OSError) as error:
        print(f"no message is sent: {error}", file=sys.stderr, flush=True)
        return
    state = cause.value if cause in (Cause.finished, Cause.stopped, Cause.cancelled) else "failed"
    name = full_name(run)
    text = f"{name}: {state}" + (f" ({detail})" if detail else "")
    message = {"text": text, "run": name, "state": state, "detail": detail, "run_dir": str(run.path)}
    ways = ((_post, config.url, message), (_run, config.command, text))
    senders = [
        Thread(target=send, args=(to, content), daemon=True) for send, to, content in ways if to is not None
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(_LONGEST_S)


def _post(url: str, message: dict[str, str]) -> None:
    import http.client  # loaded here: a submission needs neither, and they take 20 ms
    import urllib.request

    body = json.dumps(message).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=_LONGEST_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        _complain("url", type(error).__name__)


def _run(command: str, text: str) -> None:
    try:
        shell = ["/bin/sh", "-c", command]
        # The stdout of begin is the attempt's number.
        done = subprocess.run(shell, input=f"{text}\n", text=True, timeout=_LONGEST_S, stdout=2)
    except (OSError, subprocess.SubprocessError) as error:
        _complain("command", type(error).__name__)
    else:
        if done.returncode:
            _complain("command", f"status {done.returncode}")


def _complain(way: str, why: str) -> None:
    """Print neither the URL nor the command, which may hold a secret."""
    print(f"notify.{way} failed: {why}", file=sys.stderr, flush=True)
