"""The API key on every route: who passes, and that the keys are vLLM's."""

from argparse import Namespace

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount
from starlette.testclient import TestClient, WebSocketDenialResponse

from vllm_edlm.api_key import RequireApiKey, server_keys

KEYS = ["first-key", "second-key"]
BEARER = {"Authorization": "Bearer second-key"}
PREFLIGHT = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}


def application(api_key: list[str] | None, root_path: str = "") -> TestClient:
    """One route of each kind, with the middlewares in vLLM's order."""
    app = FastAPI(root_path=root_path)
    app.state.args = Namespace(api_key=api_key)
    app.get("/health")(lambda: "alive")
    app.get("/health/more")(lambda: "secret")
    app.post("/v1/answers")(lambda: "answer")
    app.routes.append(Mount("/metrics", PlainTextResponse("figures")))

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")

    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"])
    app.add_middleware(RequireApiKey)
    return TestClient(app)


ROUTES = [
    *[("GET", path) for path in ("/docs", "/openapi.json", "/metrics", "/health/more", "/health/")],
    *[("POST", path) for path in ("/v1/answers", "/nowhere")],
    *[
        ("OPTIONS", "/v1/answers"),
        ("HEAD", "/docs"),
        ("GET", "//health"),
        ("GET", "/health%2Fmore"),
    ],
]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_every_route_but_health_refuses_without_a_key(route: tuple[str, str]) -> None:
    client = application(KEYS)
    assert client.request(*route).status_code == 401
    assert client.request(*route, headers=BEARER).status_code != 401


@pytest.mark.parametrize("root_path", ["", "/behind/a/proxy"])
def test_health_needs_no_key(root_path: str) -> None:
    client = application(KEYS, root_path)
    assert client.get("/health").status_code == 200
    assert client.get(f"{root_path}/health").status_code == 200
    assert client.get(f"{root_path}/docs").status_code == 401


HEADERS = [
    ("Bearer first-key", 200),
    ("bearer second-key", 200),
    *[(header, 401) for header in ("Bearer first-ke", "Bearer first-key2", "Bearer ", "Bearer")],
    *[(header, 401) for header in ("first-key", "Basic first-key", "Bearer  first-key", "")],
    ("Bearer first-key,second-key", 401),
]


@pytest.mark.parametrize(("header", "status"), HEADERS)
def test_only_a_whole_bearer_key_passes(header: str, status: int) -> None:
    response = application(KEYS).post("/v1/answers", headers={"Authorization": header})
    assert response.status_code == status


def test_a_refusal_says_what_is_missing() -> None:
    response = application(KEYS).post("/v1/answers")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer" in response.json()["error"]["message"]
    assert not any(key in response.text for key in KEYS)


def test_a_websocket_is_refused_before_it_is_accepted() -> None:
    client = application(KEYS)
    with pytest.raises(WebSocketDenialResponse) as refusal, client.websocket_connect("/socket"):
        pass
    assert refusal.value.status_code == 401
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/health"):
        pass
    with client.websocket_connect("/socket", headers=BEARER) as socket:
        assert socket.receive_text() == "hello"


def test_a_preflight_is_answered_and_reaches_no_route() -> None:
    client = application(KEYS)
    answer = client.options("/v1/answers", headers=PREFLIGHT)
    assert (answer.status_code, answer.text) == (200, "OK")
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    # With another method, or in part, it is a request like any other.
    assert client.post("/v1/answers", headers=PREFLIGHT).status_code == 401
    assert client.options("/v1/answers", headers={"Origin": "http://a"}).status_code == 401


@pytest.mark.parametrize("route", ROUTES[:6], ids=str)
def test_without_keys_nothing_is_refused(
    route: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert application(None).request(*route).status_code != 401


def test_keys_are_those_of_vllms_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert server_keys(Namespace(api_key=None)) == ["of the environment"]
    assert server_keys(Namespace(api_key=KEYS)) == KEYS
    assert application(None).post("/v1/answers", headers=BEARER).status_code == 401
    monkeypatch.setenv("VLLM_API_KEY", "")
    assert server_keys(Namespace(api_key=None)) == []
