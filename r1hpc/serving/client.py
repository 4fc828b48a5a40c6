"""Send HTTP requests to a server, and check that it has the key before it is given the key.

For the job itself (process.py) and loadtest.py. `ask` checks; before `read` and `post` the caller does.

client = Client("http://10.4.0.17:23817")
client.is_ours(key)                 # True if it has proven to have the key; None: nobody answers
client.ask("/health", key)          # the HTTP status; None: no answer
client.read("/v1/models", key)      # (HTTP status, body)
"""

import hmac
import http.client
import json
import secrets
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from r1hpc.serving.vllm_server import CHALLENGE, PROOF, proof

_ANSWER_S = 10.0
_MOST_BYTES = 4 << 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Never follow redirects: the other server would get the key, or prove it for this one."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
"""Ignores a site's HTTP proxy, which leads out of the cluster, not into it."""


@dataclass
class Client:
    url: str

    def ask(self, path: str, key: str | None) -> int | None:
        """Return the HTTP status of a GET; None: no answer. Give the key only to a proven server."""
        if key is not None and not self.is_ours(key):
            return None
        return self._get(path, _authorization(key))[0]

    def is_ours(self, key: str) -> bool | None:
        """True if the listener has the key; None if nobody listens. Other users of the node see the port on
        the command line, and could take it first."""
        challenge = secrets.token_hex(16)
        status, said, _ = self._get("/health", {CHALLENGE: challenge})
        right = proof(key.encode(), challenge.encode())
        return None if status is None else hmac.compare_digest(said.encode(), right.encode())

    def read(self, path: str, key: str | None) -> tuple[int | None, bytes]:
        """Return (HTTP status, body), or (None, b""). The caller checks that the server may have the key."""
        status, _, said = self._get(path, _authorization(key))
        return status, said

    def post(self, path: str, key: str | None, body: dict[str, Any], timeout_s: float) -> Any:
        """Return the open answer to this JSON, a file of bytes. The caller checks that it may have the key.

        Raise OSError or http.client.HTTPException if there is no answer, urllib's HTTPError for a status
        above 399.
        """
        headers = {**_authorization(key), "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return _OPENER.open(request, timeout=timeout_s)

    def _get(self, path: str, headers: dict[str, str]) -> tuple[int | None, str, bytes]:
        """Return (HTTP status, the answer's proof, body)."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with _OPENER.open(request, timeout=_ANSWER_S) as answer:
                return int(answer.status), answer.headers.get(PROOF, ""), answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get(PROOF, ""), b""
        except (OSError, http.client.HTTPException, ValueError):  # nobody listens, or it is not HTTP
            return None, "", b""


def _authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
