"""What a connection may do: a real server in a thread, an app of a few lines, and clients that speak in raw bytes."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from service.web import connections
from service.web.connections import AtOnce, Door, room
from tests.service.live import Server, running
from tests.service.test_main import ROOT, command

LARGE = 8_000_000
LATER_S = 0.2


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the body or, to /headers, their names; /large with more than the sockets hold.

    To /later a head goes first, and the rest when the client has had the time to take it.
    """
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    if scope["path"] == "/headers":
        body = b",".join(name for name, _ in scope["headers"])
    content = bytes(LARGE) if scope["path"] == "/large" else scope["path"].encode() + b":" + body
    how = type(receive.__self__.transport).__name__  # type: ignore[attr-defined]
    headers = [(b"content-length", str(len(content)).encode()), (b"sent-by", how.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if scope["path"] == "/later":
        await asyncio.sleep(LATER_S)
        await send({"type": "http.response.body", "body": content[:1], "more_body": True})
        content = content[1:]
    await send({"type": "http.response.body", "body": content})


@contextmanager
def served(**bounds: float) -> Iterator[tuple[int, Door]]:
    """Port and door of a server that sweeps every 20 ms."""
    given = {"max_connections": 10, "header_timeout_s": 5, "answer_timeout_s": 5, **bounds}
    door = Door(**given)  # type: ignore[arg-type]
    config = uvicorn.Config(echo, log_config=None, lifespan="off", http=door.protocol(), ws="none")
    listener = socket.create_server(("127.0.0.1", 0))
    with running(Server(config), listener):
        yield listener.getsockname()[1], door


CLIENTS: list[socket.socket] = []


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(connections, "SWEEP_S", 0.02)
    monkeypatch.setattr(connections, "TELL_S", 1e9)
    yield
    while CLIENTS:
        CLIENTS.pop().close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as (port, _):
        yield port


def connected(port: int, first: bytes = b"", *, room: int | None = None) -> socket.socket:
    """`room`: bytes that the kernel keeps for who does not take them; where it chooses, as many as LARGE."""
    client = socket.socket()
    CLIENTS.append(client)
    client.settimeout(5)
    if room is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.connect(("127.0.0.1", port))
    client.sendall(first)
    return client


def answered(client: socket.socket) -> bytes:
    """An answer of `echo` to GET, which may come in pieces."""
    out = b""
    while not out.endswith(b"/get:") and (data := client.recv(1000)):
        out += data
    return out


def everything(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    out = b""
    while data := client.recv(65536):
        out += data
    return out


def said(port: int, words: bytes) -> bytes:
    with closing(connected(port, words)) as client:
        return everything(client)


def is_open(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return client.recv(65536) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def closed_after(*clients: socket.socket) -> float:
    start = time.monotonic()
    while any(is_open(client) for client in clients):
        assert time.monotonic() < start + 10
    return time.monotonic() - start


GET = b"GET /get HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n", id="length and chunks"),
        pytest.param(POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n", id="chunks and length"),
        pytest.param(POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", id="two lengths"),
        pytest.param(POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", id="a length twice"),
        pytest.param(POST + b"Content-Length: 4, 4\r\n\r\nabcd", id="a list of lengths"),
        pytest.param(POST + b"Content-Length: +4\r\n\r\nabcd", id="a length with a sign"),
        pytest.param(POST + b"Content-Length : 4\r\n\r\nabcd", id="a space before the colon"),
        pytest.param(POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", id="a length of thirty digits"),
        pytest.param(POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", id="an unknown coding"),
        pytest.param(POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", id="chunks not last"),
        pytest.param(POST + CHUNKED + b"\r\n0x3\r\nabc\r\n0\r\n\r\n", id="a chunk size that is none"),
        pytest.param(POST + CHUNKED + b"\r\n3\nabc\n0\n\n", id="chunks with bare line feeds"),
        pytest.param(b"GET / HTTP/1.1\nHost: a\n\n", id="bare line feeds"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", id="one bare line feed"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\rX: y\r\n\r\n", id="a bare carriage return"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n z\r\n\r\n", id="a folded header"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n", id="a zero byte"),
        pytest.param(b"GET / HTTP/1.1\r\nX y: z\r\n\r\n", id="a space in a name"),
        pytest.param("GET /é HTTP/1.1\r\nHost: a\r\n\r\n".encode(), id="a path that is not ASCII"),
        pytest.param(b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", id="an address without a path"),
        pytest.param(b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", id="a tunnel"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00", id="TLS"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(port: int, words: bytes) -> None:
    answer = said(port, words)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"code": "invalid_request"' in answer
    assert said(port, LAST).endswith(b"/last:")  # nobody else noticed


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"y" * 65_536,
        b"".join(b"X%d: y\r\n" % n for n in range(5000)) + b"X: y",
        b"X: y\r\n" * 100 + b"X: y",
    ],
    ids=["one large header", "many headers", "one too many"],
)
def test_a_head_of_more_than_16_kB_or_100_headers_is_refused(port: int, head: bytes) -> None:
    assert said(port, b"GET / HTTP/1.1\r\n" + head + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    assert said(port, GET + b"GET / HTTP/1.1\r\n" + head + b"\r\n\r\n").count(b"HTTP/1.1 200 ") == 1


@pytest.mark.slow
def test_a_head_that_grows_without_end_is_refused_while_it_grows(port: int) -> None:
    with closing(connected(port, b"GET / HTTP/1.1\r\nX: ")) as client:
        sent, answer = 0, b""
        client.settimeout(0.02)
        while not answer:
            try:
                client.sendall(b"y" * 1000)
                sent += 1000
                answer = client.recv(1000)
            except TimeoutError:
                pass
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert sent < 2 * connections.MAX_HEAD_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endless", "whole"),
    [
        (b"a:b\r\n", POST + CHUNKED + b"\r\n3\r\nabc\r\n0\r\n"),
        (b"a", POST + CHUNKED + b"\r\n3\r\nabc\r\n0\r\na: "),
        (b";x=y", POST + CHUNKED + b"\r\n3"),
    ],
    ids=["trailers", "a trailer", "extensions"],
)
def test_what_grows_between_the_pieces_of_a_body_is_refused_while_it_grows(
    port: int, endless: bytes, whole: bytes
) -> None:
    client = connected(port, whole)
    sent, answer = 0, b""
    client.settimeout(0.02)
    with suppress(ConnectionError):
        while not answer and sent < 2_000_000:
            client.sendall(endless * 1_000)
            sent += 1_000 * len(endless)
            with suppress(TimeoutError):
                answer = client.recv(1000)
    assert sent < 500_000
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")) or not answer
    assert not is_open(client)


def test_chunks_of_a_byte_each_are_a_body_like_any_other(port: int) -> None:
    body = bytes(range(97, 123)) * 500
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = said(port, b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + CHUNKED + b"\r\n" + chunks)
    assert answer.endswith(b"/x:" + body)


@pytest.mark.slow
def test_many_requests_in_one_piece_may_have_bodies(port: int) -> None:
    """Of the last of them little has come when what came with it is counted."""
    body = bytes(range(97, 123)) * 150
    request = b"POST /many HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    whole = (request + body) * 12 + request + body[:10]
    client = connected(port, whole)
    time.sleep(0.2)
    client.sendall(body[10:] + LAST)
    assert everything(client).count(b"/many:" + body) == 13


def test_a_trailer_is_no_header(port: int) -> None:
    chunks = b"\r\n3\r\nabc\r\n0\r\nauthorization: Bearer x\r\ncontent-type: image/png\r\n\r\n"
    asked = POST.replace(b"POST / ", b"POST /headers ") + CHUNKED + chunks
    first = said(port, asked + LAST).split(b"HTTP/1.1 200 OK")[1]
    assert first.endswith(b"/headers:host,transfer-encoding")


@pytest.mark.slow
def test_who_only_begins_to_ask_goes_for_who_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENT_S", 0.2)
    with served(max_connections=3) as (port, _):
        begun = [connected(port, b"G") for _ in range(3)]
        time.sleep(0.4)
        assert said(port, LAST).endswith(b"/last:")
        assert [is_open(client) for client in begun].count(False) == 1


def test_ordinary_heads_pass_however_they_arrive(port: int) -> None:
    head = POST + b"Content-Length: 3\r\n" + b"X: y\r\n" * 90 + b"Y: " + b"z" * 10_000 + b"\r\n\r\n"
    with closing(connected(port)) as client:
        for _ in range(3):
            for start in range(0, len(head), 500):
                client.sendall(head[start : start + 500])
            client.sendall(b"abc")
            assert client.recv(65536).endswith(b"/:abc")


def test_requests_sent_at_once_are_answered_in_order(port: int) -> None:
    body = b"x" * 300_000  # more than one read: the head behind it is not taken for part of a larger one
    words = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body + GET + LAST
    answers = said(port, words).split(b"HTTP/1.1 200 OK")[1:]
    assert [answer[-6:] for answer in answers] == [b"xxxxxx", b"\n/get:", b"/last:"]


class Sent(asyncio.Transport):
    """Takes note of each piece that would be a packet of its own."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any) -> None:
        self.pieces.append(data)

    def writelines(self, list_of_data: Any) -> None:
        raise AssertionError  # an empty last piece hangs asyncio's own transport (Python 3.12)

    def is_closing(self) -> bool:
        return b"closed" in self.pieces

    def close(self) -> None:
        self.pieces.append(b"closed")


def test_an_answer_leaves_in_one_piece_and_its_end_closes_behind_it() -> None:
    async def answered(*pieces: bytes, pause: bool) -> list[bytes]:
        sent = Sent()
        transport = AtOnce(sent, asyncio.get_running_loop())
        for piece in pieces:
            transport.write(piece)
            if pause:
                await asyncio.sleep(0)
        transport.close()
        return sent.pieces

    assert asyncio.run(answered(b"head", b"body", pause=False)) == [b"headbody", b"closed"]
    assert asyncio.run(answered(b"head", b"body", b"more", pause=False)) == [b"headbody", b"more", b"closed"]
    assert asyncio.run(answered(b"head", b"body", pause=True)) == [b"head", b"body", b"closed"]
    assert asyncio.run(answered(b"head", pause=False)) == [b"head", b"closed"]
    assert asyncio.run(answered(b"head", b"", pause=False)) == [b"head", b"closed"]
    large = bytes(70_000)
    assert asyncio.run(answered(b"head", large, pause=False)) == [b"head", large, b"closed"]


def test_a_head_that_waits_is_not_sent_on_a_connection_that_is_gone() -> None:
    async def answered() -> list[bytes]:
        sent = Sent()
        AtOnce(sent, asyncio.get_running_loop()).write(b"head")
        sent.close()
        await asyncio.sleep(0)
        return sent.pieces

    assert asyncio.run(answered()) == [b"closed"]


def test_a_head_does_not_wait_for_a_body_that_comes_later(port: int) -> None:
    client = connected(port, b"GET /later HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    start = time.monotonic()
    first = client.recv(65536)
    assert time.monotonic() - start < LATER_S
    assert first.endswith(b"\r\n\r\n")
    assert everything(client) == b"/later:"


def test_an_answer_to_head_comes_at_once_and_the_next_one_after_it(port: int) -> None:
    head = b"HEAD /get HTTP/1.1\r\nHost: a\r\n\r\n"
    told = said(port, head + head + LAST)
    assert told.count(b"content-length: 5") == 2
    assert told.endswith(b"/last:")
    # What comes next may be answered past it, so nothing of it may be held back.
    assert told.count(b"sent-by: AtOnce") == 1


def test_who_waits_to_be_told_to_go_on_is_told(port: int) -> None:
    client = connected(port, POST + b"Connection: close\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(b"abc")
    assert everything(client).endswith(b"/:abc")


def test_what_breaks_the_protocol_waits_for_the_answers_before_it(port: int) -> None:
    answers = said(port, GET + b"\x01\x02 garbage\r\n\r\n")
    assert answers.startswith(b"HTTP/1.1 200 ")
    assert answers.endswith(b"/get:")


def test_very_many_requests_sent_at_once_are_not_all_kept(port: int) -> None:
    answers = said(port, GET * 5000)
    assert answers.count(b"HTTP/1.1 200 ") == answers.count(b"HTTP/1.1 ") == connections.MAX_PIPELINED + 1


@pytest.mark.slow
@pytest.mark.parametrize("offer", [b"h2c", b"websocket"])
def test_an_offer_to_upgrade_is_passed_over_and_the_body_is_not(port: int, offer: bytes) -> None:
    # Java's client offers h2c with every first request, whatever it carries.
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + offer + b"\r\nHTTP2-Settings: AAM\r\n"
    with closing(connected(port)) as client:
        for _ in range(2):
            client.sendall(POST + upgrade + b"Content-Length: 6\r\n\r\nabc")
            time.sleep(0.05)
            client.sendall(b"def")  # would be the start of another request to whoever thinks there is no body
            assert client.recv(65536).endswith(b"/:abcdef")
        client.sendall(POST + upgrade + CHUNKED + b"\r\n3\r\nabc\r\n0\r\n\r\n" + LAST)
        answers = everything(client)
        assert b"/:abc" in answers
        assert answers.endswith(b"/last:")


@pytest.mark.slow
def test_who_sends_no_whole_head_in_time_is_let_go() -> None:
    with served(header_timeout_s=0.5) as (port, door):
        silent, partial = connected(port), connected(port, GET[:-2])
        second = connected(port, GET)
        assert answered(second).endswith(b"/get:")
        second.sendall(b"GET / HT")
        trickle = connected(port)
        stop = threading.Event()

        def drip() -> None:
            try:
                for byte in b"\r\n" * 100 + GET * 100:
                    trickle.sendall(bytes([byte]))
                    if stop.wait(0.02):
                        return
            except OSError:
                return

        thread = threading.Thread(target=drip)
        thread.start()
        took = closed_after(silent, partial, second, trickle)
        stop.set()
        thread.join()
        assert 0.3 < took < 3
        assert door.ended["sent no request"] == 4


@pytest.mark.slow
def test_who_is_between_two_requests_or_sends_a_body_is_not_let_go() -> None:
    with served(header_timeout_s=0.1) as (port, _):
        idle, busy = connected(port, GET), connected(port, POST + b"Content-Length: 3\r\n\r\na")
        assert idle.recv(1000)
        time.sleep(0.5)
        idle.sendall(LAST)
        busy.sendall(b"bc")
        assert everything(idle).endswith(b"/last:")
        assert busy.recv(1000).endswith(b"/:abc")


@pytest.mark.slow
def test_who_does_not_take_an_answer_is_let_go_and_who_is_slow_is_not() -> None:
    with served(answer_timeout_s=0.5) as (port, door):
        request = b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        asleep, slow = connected(port, request), connected(port, request)
        taken = 0
        start = time.monotonic()
        while taken < LARGE:
            data = slow.recv(100_000)
            assert data
            taken += len(data)
            time.sleep(0.02)
        assert time.monotonic() - start > 1
        assert door.ended["did not take an answer"] == 1
        with pytest.raises(ConnectionResetError):
            everything(asleep)


def test_answers_that_nobody_takes_go_when_they_leave_no_room_in_memory() -> None:
    with served(max_unsent_bytes=100_000) as (port, door):
        request = b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        asleep = [connected(port, request, room=10_000) for _ in range(4)]
        until = time.monotonic() + 10
        while door.ended["left too much untaken"] < 3:  # the last one may be alone by then, and stay
            assert time.monotonic() < until
            time.sleep(0.01)
        assert said(port, LAST).endswith(b"/last:")  # who takes what it asked for has no part in it
        reset = 0
        for client in asleep:
            try:
                everything(client)
            except ConnectionResetError:
                reset += 1
        assert reset >= 3


def test_who_left_most_untaken_goes_first_and_no_more_than_has_to() -> None:
    door, gone = Door(max_connections=1, header_timeout_s=1, answer_timeout_s=1, max_unsent_bytes=100), list[int]()

    def leaving(size: int) -> Any:
        transport = SimpleNamespace(get_write_buffer_size=lambda: size)
        return SimpleNamespace(unsent=size, transport=transport, drop=lambda _: gone.append(size))

    some = [leaving(size) for size in (30, 90, 5, 60)]
    door._unsent = [*some, leaving(1000)]
    door._bound_unsent(some)  # type: ignore[arg-type]  # the last one has gone
    assert gone == [90]
    alone = leaving(1000)
    door._unsent = [alone]
    door._bound_unsent([alone])  # type: ignore[arg-type]  # it may have an answer of any size
    assert gone == [90]


@pytest.mark.slow
def test_who_goes_while_the_others_are_looked_at_does_not_end_the_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "AT_ONCE", 1)
    request = b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n"
    with served(max_unsent_bytes=100_000, header_timeout_s=0.5, answer_timeout_s=0.1) as (port, _):
        for _round in range(30):
            asleep = [connected(port, request, room=10_000) for _ in range(4)]
            time.sleep(0.02)
            for client in asleep[::2]:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, connections.RESET)
                client.close()
        silent = connected(port, b"GET / HT")
        silent.settimeout(5)
        assert everything(silent) == b""


@pytest.mark.slow
def test_who_comes_when_there_is_no_room_is_told_so_and_harms_nobody() -> None:
    with served(max_connections=3) as (port, door):
        inside = [connected(port, GET) for _ in range(3)]
        assert all(answered(client).endswith(b"/get:") for client in inside)
        for _ in range(100):
            answer = said(port, GET)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1" in answer
            assert b'"code": "overloaded"' in answer
        assert door.ended["found no room"] == 100
        for client in inside:
            client.sendall(GET)
            assert answered(client).endswith(b"/get:")
        inside[0].close()
        time.sleep(0.1)
        assert said(port, LAST).endswith(b"/last:")


@pytest.mark.slow
def test_who_says_nothing_goes_for_who_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SILENT_S", 0.3)
    with served(max_connections=4) as (port, door):
        asked = connected(port, GET)
        assert answered(asked).endswith(b"/get:")
        time.sleep(0.1)
        silent = [connected(port) for _ in range(2)]
        begun = connected(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\na")
        assert said(port, LAST).startswith(b"HTTP/1.1 503 ")  # nobody has been silent for long
        time.sleep(0.4)
        assert said(port, LAST).endswith(b"/last:")
        assert [is_open(client) for client in silent].count(False) == 1  # rather than who asked something once
        come = [connected(port, GET) for _ in range(2)]
        assert all(answered(client).endswith(b"/get:") for client in come)
        assert not any(is_open(client) for client in silent)
        assert is_open(asked)
        assert said(port, LAST).endswith(b"/last:")  # who asked once, and then nothing for long
        assert not is_open(asked)
        begun.sendall(b"bcde")
        assert begun.recv(1000).endswith(b"/:abcde")
        assert door.ended["was silent when others came"] == 3
        assert door.ended["found no room"] == 1


@pytest.mark.slow
def test_those_who_linger_are_few_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.3)
    monkeypatch.setattr(connections, "MOST_LINGER", 5)
    with served(max_connections=1) as (port, door):
        inside = connected(port, GET)
        assert inside.recv(1000)
        for _ in range(20):
            connected(port)
        time.sleep(0.1)
        assert len(door._lingering) == 5
        time.sleep(0.5)
        assert not door._lingering
    assert not [record for record in caplog.records if record.exc_info]


def test_the_log_hears_of_it_once_however_often_it_happens(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "TELL_S", 10)
    door = Door(max_connections=1, header_timeout_s=1, answer_timeout_s=1)
    loop: Any = SimpleNamespace(call_later=lambda *_: None)
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            door.ended["sent no request"] += 50
            door._sweep(set(), loop)
    assert [record.getMessage() for record in caplog.records] == ["Connections were ended: 50 sent no request."]
    assert door.ended["sent no request"] == 19 * 50  # to be told later


@pytest.mark.parametrize(
    ("limits", "wanted", "fits", "raised"),
    [
        ((1024, 1024), 500, 500, None),
        ((1024, 4096), 2048, 2048, 2176),
        ((1024, 2000), 2048, 1872, 2000),
        ((1024, -1), 10_000, 10_000, 10_128),
        ((-1, -1), 10_000, 10_000, None),
        ((100, 100), 2048, 50, 100),
    ],
)
def test_connections_leave_room_for_other_files(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], wanted: int, fits: int, raised: int | None
) -> None:
    found: list[int] = []
    stand_in = SimpleNamespace(
        RLIMIT_NOFILE=7,
        RLIM_INFINITY=-1,
        getrlimit=lambda _: limits,
        setrlimit=lambda _, given: found.append(given[0]),
    )
    monkeypatch.setitem(sys.modules, "resource", stand_in)
    assert room(wanted) == fits
    assert found == ([] if raised is None else [raised])


@pytest.mark.slow
def test_a_lane_that_never_returns_does_not_keep_the_service_from_ending(tmp_path: Path) -> None:
    hanging = (
        "import threading, time, service.__main__ as main, models.extractor_onnx as onnx;"
        "main.GRACE_S, main.HANGING_S = 1, 1; run = onnx.OnnxExtractor.__call__\n"
        "def hangs(self, batch):\n"
        "    if threading.current_thread().name.startswith('lane-'): time.sleep(1000)\n"
        "    return run(self, batch)\n"
        "onnx.OnnxExtractor.__call__ = hangs; main.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", hanging], cwd=ROOT, env=command(tmp_path), text=True, stdout=subprocess.PIPE
    )
    assert process.stdout
    with process.stdout:
        address = next(re.search(r":(\d+)", line) for line in process.stdout if "ready" in line)
        assert address
        image = (ROOT / "service" / "sample" / "alpha" / "1.png").read_bytes()
        head = f"POST /v1/embed HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"
        with closing(connected(int(address[1]), head.encode() + image)):
            time.sleep(0.5)
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 1
    assert 1.5 < time.monotonic() - start < 10
