"""An API key for every route of a vLLM server, not for those under /v1 alone.

vLLM's `--api-key` and `VLLM_API_KEY` leave open what stands elsewhere: /invocations, which
generates as /v1 does, /tokenize, /metrics, /docs and more. With `--middleware
vllm_edlm.api_key.RequireApiKey` the same keys guard all of it, whatever routes a later vLLM has.
Without a key the middleware does nothing.

Open stay /health, since probes carry no key and it says nothing but alive, and what a browser
asks before a request (CORS preflight), which never reaches a route. /ping is not: it is
/health for platforms that authenticate by themselves.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATH = "/health"
GUARDED_SCOPES = ("http", "websocket")
MESSAGE = "This server wants an API key: send the header 'Authorization: Bearer KEY'."


class RequireApiKey:
    """ASGI middleware: without a key of the server a request is a 401, which no route sees.

    A websocket is refused before it is accepted.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._app if _may_pass(scope) else _refusal()
        await answer(scope, receive, send)


def server_keys(args: Namespace) -> list[str]:
    """The keys that vLLM's own check takes: `--api-key`, else `VLLM_API_KEY`; empty ones are none.

    Args:
        args: those of `vllm serve`.
    """
    return [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]


def bears_key(headers: Headers, keys: Sequence[str]) -> bool:
    """Whether the Authorization header holds one of the keys.

    The time does not tell how much of a key is right, nor which one is near.
    """
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Every key is compared, and digests are of one length.
    matches = [compare_digest(_digest(given), _digest(key)) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _may_pass(scope: Scope) -> bool:
    if scope["type"] not in GUARDED_SCOPES:
        return True
    keys, headers = server_keys(scope["app"].state.args), Headers(scope=scope)
    return not keys or _is_open(scope) or _is_preflight(scope, headers) or bears_key(headers, keys)


def _is_open(scope: Scope) -> bool:
    # As the router sees it: behind a proxy the path may begin with the root path.
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return scope["type"] == "http" and path == OPEN_PATH


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """What vLLM's CORS middleware answers by itself."""
    asks = "origin" in headers and "access-control-request-method" in headers
    return scope.get("method") == "OPTIONS" and asks


def _refusal() -> JSONResponse:
    error = {"message": MESSAGE, "type": "Unauthorized", "param": None, "code": 401}
    return JSONResponse({"error": error}, 401, {"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
