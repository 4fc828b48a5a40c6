"""What is asked of a server from outside, and whether it may be given the key.

client = Client("http://10.4.0.17:23817")
client.is_ours(key)                 # whether it has proven to have the key; None: nobody answers
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

from r1hpc.serving.gate import CHALLENGE, PROOF, proof

_ANSWER_S = 10.0
_MOST_BYTES = 4 << 20


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Who sends on to another server has not answered: that one would be given the key, or prove for this."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
"""A site's HTTP proxy leads out of the cluster, not into it."""


@dataclass
class Client:
    """Of one server."""

    url: str

    def ask(self, path: str, key: str | None) -> int | None:
        """The HTTP status of a GET; None: no answer. The key goes to nobody who has not proven to have it."""
        if key is None:
            return self._get(path, {})[0]
        if not self.is_ours(key):
            return None
        return self._get(path, authorization(key))[0]

    def is_ours(self, key: str) -> bool | None:
        """Whether who listens has the key; None: nobody does.

        Others on the node see the port on the command line, and could take it first.
        """
        challenge = secrets.token_hex(16)
        status, said, _ = self._get("/health", {CHALLENGE: challenge})
        right = proof(key.encode(), challenge.encode())
        return None if status is None else hmac.compare_digest(said.encode(), right.encode())

    def read(
        self, path: str, key: str | None, body: dict[str, Any] | None = None
    ) -> tuple[int | None, bytes]:
        """(HTTP status, body) of a GET, or of a POST of this JSON; (None, nothing): no answer.

        Whether it may have the key is the caller's to ask.
        """
        status, _, said = self._get(path, authorization(key), body)
        return status, said

    def _get(
        self, path: str, headers: dict[str, str], body: dict[str, Any] | None = None
    ) -> tuple[int | None, str, bytes]:
        """(HTTP status, what the answer proves, body)."""
        data = None if body is None else json.dumps(body).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, {**headers, **kind})
        try:
            with _OPENER.open(request, timeout=_ANSWER_S) as answer:
                return int(answer.status), answer.headers.get(PROOF, ""), answer.read(_MOST_BYTES)
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get(PROOF, ""), b""
        except (OSError, http.client.HTTPException, ValueError):  # nobody, or no HTTP
            return None, "", b""


def authorization(key: str | None) -> dict[str, str]:
    """The header that gives the key; none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
