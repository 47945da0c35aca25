"""The HTTP client: limits of time and size, errors that name the URL, cancelling."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from megatron_occ.rollout.engine import EngineError
from megatron_occ.rollout.remote.http import Cancelled, Client, TransportError
from tests.unit.fake_servers import FakeVllm

SAMPLE = {
    "prompt": [2],
    "logprobs": 0,
    "seed": 1,
    "max_tokens": 3,
    "stop_token_ids": [],
    "temperature": 1.0,
}
PATH = "/v1/completions"


@pytest.fixture
def server():
    fake = FakeVllm()
    yield fake
    fake.close()


def client(fake, **limits):
    return Client(fake.url, limits.get("timeout", 5.0), limits.get("max_bytes", 10**6))


def test_an_answer_is_json(server):
    assert client(server).post(PATH, SAMPLE)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fault", "retry", "says"),
    [
        ("500", True, 'HTTP 500: \'{"error": "out of memory"}\''),
        ("400", False, "HTTP 400"),
        ("drop", True, "RemoteDisconnected"),
        ("truncate", True, "987 bytes missing"),
        ("text", True, "not JSON: '<html>gateway</html>'"),
        ("deep", True, "not JSON"),
        ("huge", False, "answer over 1000000 bytes"),
    ],
)
def test_a_failure_names_url_and_cause(server, fault, retry, says):
    server.faults = [fault]
    with pytest.raises(TransportError) as caught:
        client(server).post(PATH, SAMPLE)
    assert f"{server.url}{PATH}: " in str(caught.value) and says in str(caught.value)
    assert caught.value.retry is retry
    assert len(str(caught.value)) < 450


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_the_time_limit_is_one_of_the_whole_call(server, fault):
    server.faults = [fault]
    start = time.monotonic()
    with pytest.raises(TransportError, match=r"no answer in 0\.2 s") as caught:
        client(server, timeout=0.2).post(PATH, SAMPLE)
    assert caught.value.retry
    assert time.monotonic() - start < 0.9  # both faults last longer


def test_nobody_listening_may_be_retried():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(TransportError, match=url) as caught:
            Client(url, 1.0, 1000).get("/health")
    assert caught.value.retry


@pytest.mark.parametrize("url", ["", "node7:8000", "ftp://a", "file:///etc", "http://a/?x=1"])
def test_other_urls_are_refused(url):
    with pytest.raises(EngineError, match="URL"):
        Client(url, 1.0, 1000)


def test_cancel_ends_a_running_call(server):
    server.faults = ["slow"]
    one = client(server)
    errors = []

    def call():
        with pytest.raises(Cancelled) as caught:
            one.post(PATH, SAMPLE, stop=threading.Event())
        errors.append(caught.value)

    thread = threading.Thread(target=call)
    thread.start()
    while not server.calls:
        time.sleep(0.005)
    one.cancel()
    thread.join(0.5)
    assert errors and not thread.is_alive()


def test_a_call_does_not_start_once_stopped(server):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        client(server).post(PATH, SAMPLE, stop=stop)
    assert server.calls == []


def test_the_key_is_sent_and_not_shown(server):
    seen = []
    handle = server.http.RequestHandlerClass.handle_call

    def spy(handler, body):
        seen.append(handler.headers["Authorization"])
        handle(handler, body)

    server.http.RequestHandlerClass.handle_call = spy
    Client(server.url, 1.0, 1000, "secret").get("/v1/models")
    assert seen == ["Bearer secret"]
