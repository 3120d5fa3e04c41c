"""HTTP: models, health, metrics, the page, and who may use them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus

from lingbot_rt.config import ENDPOINT, ServeConfig
from lingbot_rt.errors import CheckpointError, EngineFailed
from lingbot_rt.server.app import Server, create_app
from lingbot_rt.server.routes import page_folder
from lingbot_rt.session.plan import EngineStatus, WarmUp
from lingbot_rt.shapes import FrameSize
from lingbot_rt.telemetry import HideKeys, configure_logging
from tests.server.conftest import LIMIT_S, event, init, running, state, wait_until
from tests.server.fake_engine import FakeEngine


async def get(server, path: str, **options) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.http, timeout=LIMIT_S, verify=False) as client:
        return await client.get(path, **options)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "webui"
    (folder / "js").mkdir(parents=True)
    (folder / "index.html").write_text("<title>a world</title>")
    (folder / "js" / "main.mjs").write_text("export {}")
    (folder / "main.js").write_text("export {}")
    (folder / "face.woff2").write_bytes(b"wOF2")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return folder


async def test_models_tells_which_sizes_start_at_once(serve):
    """A server that compiles lists the sizes it has code for; any other has no such list."""
    assert "warm_sizes" not in (await get(await serve(), "/v1/models")).json()["data"][0]
    engine = FakeEngine(warm_up=WarmUp(FrameSize(128, 64), 3, None))
    assert (await get(await serve(engine), "/v1/models")).json()["data"][0]["warm_sizes"] == ["64x64"]


async def test_models_tells_what_the_page_can_offer(serve):
    """The entry has the OpenAI keys and every fact that the page builds its controls from."""
    server = await serve()
    answer = (await get(server, "/v1/models")).json()
    assert answer["object"] == "list"
    entry = answer["data"][0]
    assert (entry["id"], entry["object"], entry["ready"], entry["busy"]) == ("fake-world", "model", True, False)
    assert entry["default_size"] == "64x64"
    assert entry["sizes"][0] == "64x64"
    assert entry["num_frames"]["default"] == 9
    assert entry["num_frames"]["choices"][:3] == [1, 5, 9]
    assert entry["action_tokens"] == list("wasdijkl")
    assert entry["device"] == "cpu"
    assert entry["limits"]["max_pixels"] == 1280 * 720
    assert entry["default_output_format"] in entry["output_formats"]
    assert all(entry["features"][name] is True for name in ("guidance", "camera_poses", "recache"))
    for default in (False, True):
        other = await serve(interactive_kv_window=default)
        told = (await get(other, "/v1/models")).json()["data"][0]["interactive_kv_window"]
        assert told == {"default": default}
    assert (await get(server, "/v1/models/fake-world")).json() == entry
    async with server.client(init()) as client:
        await client.receive()
        assert (await get(server, "/v1/models")).json()["data"][0]["busy"] is True


async def test_every_offered_size_opens(serve):
    """Every size in /v1/models is accepted in an init."""
    server = await serve(max_pixels=640 * 640)
    for size in (await get(server, "/v1/models")).json()["data"][0]["sizes"]:
        async with server.client(init(size=size, num_frames=1, max_chunks=1)) as client:
            assert len((await client.chunk()).frames) == 1


async def test_an_unknown_model_is_an_openai_error(serve):
    """The answer is 404 with the body that OpenAI clients read, also for names with a slash."""
    server = await serve()
    for name in ("nobody", "some/hub-id"):
        answer = await get(server, f"/v1/models/{name}")
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["code"] == "model_not_found"
        assert "fake-world" in error["message"]


async def test_health_follows_the_engine(serve):
    """/health is 503 with stage and progress while loading and 200 when ready. /liveness is always 200."""
    server = await serve(FakeEngine(loading=EngineStatus("loading weights", 0.63)))
    before = await get(server, "/health")
    assert before.status_code == 503
    assert before.json() == {"stage": "loading weights", "progress": 0.63, "detail": ""}
    assert (await get(server, "/liveness")).status_code == 200
    entry = (await get(server, "/v1/models")).json()["data"][0]
    assert entry["ready"] is False
    assert "device" not in entry
    server.engine.finish_loading()
    assert (await get(server, "/health")).status_code == 200


async def test_an_engine_that_cannot_start_ends_the_server():
    """The server stops and keeps the error for the command line."""
    error = CheckpointError("transformer/config.json is missing")
    config = ServeConfig(port=0, log_level="warning")
    app = create_app(config, FakeEngine(start_error=error))
    await asyncio.wait_for(Server(app, config).serve(), LIMIT_S)
    assert app.state.service.failure is error


async def test_an_engine_that_fails_while_it_serves_ends_the_server(monkeypatch):
    """Sessions hear the reason, /health shows it with 503, and then the server ends with the failure."""
    monkeypatch.setattr("lingbot_rt.server.app.FAILURE_SHOWN_S", 3600)
    async with running(FakeEngine(group_s=0.02)) as server:
        async with server.client(init()) as client:
            await client.receive()
            server.engine._status = EngineStatus("failed", detail="the device is gone")
            assert (await client.closed())[0] == 1011
            assert "the device is gone" in client.seen[-1]["content"]
        answer = await get(server, "/health")
        assert (answer.status_code, answer.json()["detail"]) == (503, "the device is gone")
        server.server._ends_at = 0.0
        await wait_until(lambda: not server.server.servers[0].is_serving())
        assert isinstance(server.service.failure, EngineFailed)


async def test_metrics_count_what_was_served(serve):
    """Sessions, chunks, frames, bytes, latency and errors appear under their Prometheus names."""
    server = await serve()
    async with server.client(init(max_chunks=2), event("camera_actions", state("w"), 1), event("dance")) as client:
        await client.closed()
    await server.idle()
    answer = await get(server, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    for line in (
        "lingbot_rt_sessions_total 1.0",
        "lingbot_rt_chunks_total 2.0",
        "lingbot_rt_frames_total 21.0",
        'lingbot_rt_errors_total{code="invalid_event"} 1.0',
        'lingbot_rt_connection_ends_total{code="1000"} 1.0',
        "lingbot_rt_event_latency_ms_count 1.0",
        'lingbot_rt_live_sessions{state="playing"} 0.0',
        'lingbot_rt_session_ends_total{reason="complete"} 1.0',
        "lingbot_rt_connections 0.0",
        "lingbot_rt_ready 1.0",
    ):
        assert line in answer.text


async def test_the_page_is_served_with_types_browsers_accept(serve, page):
    """/ is index.html, modules are JavaScript, and browsers revalidate every file."""
    server = await serve(page=page)
    expected = {
        "/": "text/html",
        "/index.html": "text/html",
        "/main.js": "text/javascript",
        "/js/main.mjs": "text/javascript",
        "/face.woff2": "font/woff2",
    }
    for path, kind in expected.items():
        answer = await get(server, path)
        assert answer.status_code == 200, path
        assert answer.headers["content-type"].split(";")[0] == kind
        assert answer.headers["cache-control"] == "no-cache"
        again = await get(server, path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/js/..%5c..%5csecret.txt",
        "/link.txt",
        "//etc/passwd",
    ],
)
async def test_the_page_has_no_way_out_of_its_folder(serve, page, path):
    """No spelling of dots and no link leads to a file outside the folder."""
    server = await serve(page=page)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert b"404" in answer.split(b"\r\n")[0]
    assert b"secret" not in answer.split(b"\r\n\r\n", 1)[1]


async def test_the_api_key_guards_the_api_and_nothing_else(serve, page):
    """Models and metrics need the key. Health, liveness and the page do not."""
    server = await serve(api_key="secret", page=page)
    for path in ("/v1/models", "/v1/models/fake-world", "/metrics"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            refused = await get(server, path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert (await get(server, path, headers={"Authorization": "Bearer secret"})).status_code == 200
        assert (await get(server, path, params={"api_key": "secret"})).status_code == 401
    for path in ("/health", "/liveness", "/"):
        assert (await get(server, path)).status_code == 200


async def test_pages_from_elsewhere_may_ask_unless_narrowed(serve):
    """CORS allows every origin by default, and only the listed ones with --cors-allow-origins."""
    origin = {"Origin": "https://a.example"}
    server = await serve()
    assert (await get(server, "/v1/models", headers=origin)).headers["access-control-allow-origin"] == "*"
    narrowed = await serve(cors_allow_origins="https://a.example, https://b.example")
    answer = await get(narrowed, "/health", headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    other = await get(narrowed, "/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_a_page_elsewhere_may_send_its_key(serve):
    """The preflight for the Authorization header is answered without a key."""
    server = await serve(api_key="secret")
    headers = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization",
    }
    async with httpx.AsyncClient(base_url=server.http, timeout=LIMIT_S, verify=False) as client:
        answer = await client.options("/v1/models", headers=headers)
    assert answer.status_code == 200
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()


async def test_head_is_answered_like_get(serve, page):
    """Monitors ask with HEAD: the same status and headers as GET, and no body, on every path."""
    server = await serve(FakeEngine(loading=EngineStatus("loading weights", 0.5)), api_key="secret", page=page)
    key = {"Authorization": "Bearer secret"}
    async with httpx.AsyncClient(base_url=server.http, timeout=LIMIT_S, verify=False) as client:
        for path in ("/health", "/liveness", "/v1/models", "/metrics", "/openapi.json", "/", "/nothing", ENDPOINT):
            for headers in ({}, key):
                got, head = await client.get(path, headers=headers), await client.head(path, headers=headers)
                assert head.status_code == got.status_code, path
                assert head.headers.keys() == got.headers.keys(), path
                assert head.headers["content-length"] == got.headers["content-length"] or path == "/metrics"
                assert head.content == b""
        assert (await client.head("/health")).status_code == 503
        assert (await client.head("/liveness")).status_code == 200


async def test_a_plain_get_of_the_websocket_path_says_what_is_missing(serve):
    """A proxy that passes no Upgrade is told so by status, header and body. No key is needed to read it."""
    server = await serve(api_key="secret")
    answer = await get(server, ENDPOINT)
    assert answer.status_code == 426
    assert answer.headers["upgrade"].lower() == "websocket"
    message = answer.json()["error"]["message"]
    assert "WebSocket" in message
    assert "proxy" in message
    assert "Upgrade" in message


@pytest.mark.parametrize("path", ["/v1", "/", "/v1/v1/realtime_video/generate", ENDPOINT + "/more"])
@pytest.mark.parametrize("has_page", [True, False])
async def test_a_websocket_on_an_unknown_path_is_not_found(serve, page, path, has_page, monkeypatch):
    """404 with the right path, not 403, which is for origins and keys; with and without a page."""
    monkeypatch.setattr("lingbot_rt.server.app.page_folder", lambda: page if has_page else None)
    server = await serve()
    monkeypatch.setattr("tests.server.conftest.ENDPOINT", path)
    with pytest.raises(InvalidStatus) as refused:
        async with server.client():
            pass
    assert refused.value.response.status_code == 404
    assert ENDPOINT.encode() in refused.value.response.body


async def test_a_refused_origin_is_named(serve):
    """The handshake's 403 has the origin and the option."""
    server = await serve(cors_allow_origins="https://good.example")
    with pytest.raises(InvalidStatus) as refused:
        async with server.client(origin="https://evil.example"):
            pass
    assert refused.value.response.status_code == 403
    assert b"https://evil.example" in refused.value.response.body
    assert b"--cors-allow-origins" in refused.value.response.body


async def test_the_description_of_the_api_needs_the_key(serve):
    """/openapi.json is for those with the key, and there is no documentation page."""
    server = await serve(api_key="secret")
    assert (await get(server, "/openapi.json")).status_code == 401
    answer = await get(server, "/openapi.json", headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200
    assert "/v1/models" in answer.json()["paths"]
    for path in ("/docs", "/redoc"):
        assert (await get(server, path)).status_code == 404


async def test_browsers_guess_no_types_and_foreign_pages_frame_nothing(serve):
    """Every answer forbids guessing; the page's own policy is also its header, with who may frame it."""
    folder = page_folder()
    server = await serve(cors_allow_origins="https://good.example", page=folder)
    for path in ("/", "/js/main.js", "/health", "/v1/models", "/nothing", ENDPOINT):
        assert (await get(server, path)).headers["x-content-type-options"] == "nosniff"
    policy = (await get(server, "/")).headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["frame-ancestors"] == "'self' https://good.example"
    assert rules["script-src"] == "'self'"
    meta = (folder / "index.html").read_text()
    assert policy.removesuffix("; frame-ancestors 'self' https://good.example") in meta
    anywhere = await serve(page=folder)
    assert (await get(anywhere, "/")).headers["content-security-policy"].endswith("frame-ancestors 'self'")


async def test_a_page_without_a_policy_still_cannot_be_framed(serve, page):
    server = await serve(page=page)
    assert "frame-ancestors 'self'" in (await get(server, "/")).headers["content-security-policy"]


async def test_health_shows_no_path_of_the_server(serve):
    """What is wrong with a model's folder is told with the last name of the path only."""
    engine = FakeEngine(loading=EngineStatus("loading weights", None, "/srv/secret/model/transformer"))
    server = await serve(engine)
    for answer in (
        (await get(server, "/health")).json(),
        (await get(server, "/v1/models")).json()["data"][0]["status"],
    ):
        assert answer["detail"] == "transformer"


def test_the_log_never_shows_a_key(capsys):
    """A key in a request line is hidden, in the message and in the arguments of a log record."""
    record = logging.LogRecord("x", 20, "f", 1, "%s opened", ("/v1/x?api_key=secret&a=1",), None)
    HideKeys().filter(record)
    assert record.getMessage() == "/v1/x?api_key=***&a=1 opened"
    configure_logging("info")
    try:
        logging.getLogger("anything").warning("GET /?api_key=secret")
        assert "secret" not in capsys.readouterr().err
    finally:
        undo_logging()


def undo_logging() -> None:
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    for handler in root.handlers[:]:
        root.removeHandler(handler)


@pytest.mark.parametrize(
    "line",
    [
        "< Authorization: Bearer other",
        "< authorization: Basic other",
        "> Cookie: session=other",
        "< X-API-Key: other",
        "GET /v1/models?size=3&API_KEY=other HTTP/1.1",
        "GET /?api%5Fkey=other&size=3 HTTP/1.1",
        "[(b'authorization', b'Bearer other')]",
        "it was own/key-1 that was given",
        "GET /?k=own%2Fkey-1 HTTP/1.1",
    ],
)
def test_keys_are_hidden_wherever_they_stand(line):
    """The server's own key in any spelling, and what others send as a key."""
    hidden = HideKeys("own/key-1").hide(line)
    assert "***" in hidden
    assert "other" not in hidden
    assert "key-1" not in hidden


def test_other_words_stay_in_the_log():
    """Hiding keys leaves the rest of a line as it is."""
    hide = HideKeys("key").hide
    for line in (
        "the tokenizer: 5 tokens",
        "GET /v1/models?size=3 HTTP/1.1",
        "Sec-WebSocket-Key-Count monkeys",
        "a: b",
    ):
        assert hide(line) == line


async def test_no_key_in_the_log_at_debug_level(serve, capsys):
    """Neither the key of a header nor that of a query, right or wrong, whichever library logs it."""
    configure_logging("debug", key="s3cret-key")
    try:
        server = await serve(api_key="s3cret-key")
        for name in ("uvicorn.error", "uvicorn.access"):
            logging.getLogger(name).setLevel(logging.DEBUG)
        for key in ("s3cret-key", "wr0ng-key"):
            bearer = {"Authorization": f"Bearer {key}"}
            for path, headers in ((f"?api_key={key}", {}), (f"?api%5Fkey={key}", {}), ("", bearer)):
                async with server.client(path=path, additional_headers=headers) as client:
                    if key == "s3cret-key":
                        await client.send(init(max_chunks=1))
                    await client.closed()
                await get(server, f"/v1/models{path}", headers=headers)
        await server.idle()
        logging.getLogger("any").error("it broke", exc_info=ValueError("s3cret-key"))
        written = capsys.readouterr().err
        assert "api_key=***" in written
        assert "uthorization: ***" in written
        assert "it broke" in written
        assert "s3cret" not in written
        assert "wr0ng" not in written
    finally:
        undo_logging()
