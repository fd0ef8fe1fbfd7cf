"""The page takes uploads from itself alone, and counts their bytes whatever their headers say."""

import asyncio

import pytest

from stable_cascade import bounds
from stable_cascade.app.serving import Guard, bytes_in

OWN = [(b"host", b"127.0.0.1:7860"), (b"content-length", b"4")]


CORS = [(b"access-control-allow-origin", b"https://elsewhere.org"), (b"Access-Control-Allow-Credentials", b"true")]


def sent(headers, parts=(b"body",)):
    """The status that a POST gets, and what of its body arrives."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    answers, arrived = [], []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    async def application(scope, receive, send):
        while True:
            message = await receive()
            arrived.append(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard = Guard(application, most_bytes=10, only_this_machine=True)
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
    asyncio.run(guard(scope, receive, send))
    return answers[0]["status"], b"".join(arrived)


def test_what_the_page_sends_arrives():
    assert sent(OWN) == (200, b"body")
    own = [*OWN, (b"origin", b"http://127.0.0.1:7860"), (b"sec-fetch-site", b"same-origin")]
    assert sent(own) == (200, b"body")


@pytest.mark.parametrize(
    "header",
    [
        (b"origin", b"https://elsewhere.org"),
        (b"origin", b"http://127.0.0.1:9999"),
        (b"origin", b"null"),
        (b"sec-fetch-site", b"cross-site"),
        (b"sec-fetch-site", b"same-site"),
    ],
)
def test_what_another_page_sends_is_refused(header):
    assert sent([*OWN, header]) == (403, b"")


def test_no_other_origin_may_read_an_answer():
    """Gradio lets any origin read, with credentials, where the host is none of three names, as with `--host ::1`."""

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [*CORS, (b"vary", b"Origin")]})

    answers = []

    async def send(message):
        answers.append(message)

    headers = [(b"host", b"[::1]:7860"), (b"origin", b"https://elsewhere.org")]
    guard = Guard(application, most_bytes=10, only_this_machine=True)
    asyncio.run(guard({"type": "http", "method": "GET", "path": "/config", "headers": headers}, None, send))
    names = [name.lower() for name, _ in answers[0]["headers"]]
    assert b"vary" in names
    assert not [name for name in names if name.startswith(b"access-control-")]


def test_a_length_beside_a_transfer_encoding_is_refused():
    assert sent([*OWN, (b"transfer-encoding", b"chunked")]) == (400, b"")


def test_a_body_longer_than_its_length_is_cut_off():
    _, arrived = sent(OWN, parts=[b"12345", b"67890", b"more", b"and more"])
    assert arrived == b"1234567890"


def test_uploads_end_where_the_page_holds_enough(monkeypatch, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.png").write_bytes(b"x" * 10)
    (tmp_path / "b.png").write_bytes(b"x" * 4)
    assert bytes_in(tmp_path) == 14
    monkeypatch.setattr(bounds, "STORED_UPLOADS", 17)
    guard = Guard(None, most_bytes=10, only_this_machine=True, stored=lambda: bytes_in(tmp_path))
    scope = {"method": "POST", "path": "/gradio_api/upload", "headers": OWN}
    status, text = guard.refusal(scope)
    assert (status, text) == (507, "the page holds as many images as it may; save yours, and start it again")
    assert guard.refusal({**scope, "path": "/gradio_api/queue/join"}) is None
    (tmp_path / "b.png").unlink()
    assert guard.refusal(scope) is None


@pytest.mark.parametrize("broken_off", [True, False])
def test_an_upload_that_breaks_off_is_one_line(caplog, broken_off):
    async def application(scope, receive, send):
        message = await receive()
        raise ConnectionError(message["type"])

    async def receive():
        return {"type": "http.disconnect"} if broken_off else {"type": "http.request", "body": b"", "more_body": False}

    guard = Guard(application, most_bytes=10, only_this_machine=True)
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": OWN}
    if not broken_off:
        with pytest.raises(ConnectionError, match=r"http\.request"):
            asyncio.run(guard(scope, receive, None))
        return
    asyncio.run(guard(scope, receive, None))
    assert caplog.messages == ["a request to /gradio_api/upload broke off (ConnectionError)"]
