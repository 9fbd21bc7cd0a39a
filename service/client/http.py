"""What both clients tell httpx, and what they make of its errors."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx

from service.client.wire import Answer, Call, Lost

DEFAULT_URL = "http://127.0.0.1:8000"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECT_S = 5.0


def address(url: str | None) -> str:
    """The address of a service, with its scheme; without one, that of the environment. Raises ValueError."""
    if url is None:
        url = os.environ.get("FEWSHOT_URL") or DEFAULT_URL
    url = url if "://" in url else f"http://{url}"
    if not _is_usable(url):
        raise ValueError(f"{url!r} is no address of a service; one looks like {DEFAULT_URL}.")
    return url.rstrip("/")


def _is_usable(url: str) -> bool:
    try:
        httpx.URL(url)
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (httpx.InvalidURL, ValueError):  # a port that is none, a bracket that is not closed
        return False


def settings(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """Arguments of httpx.Client and httpx.AsyncClient. Without a key, that of the environment; "" is none."""
    headers = {"User-Agent": "fewshot-client", "Accept": "application/json"}
    if key is None:
        key = os.environ.get("FEWSHOT_KEY")
    if key:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("The key holds characters that no key has; was it copied whole, and only it?")
        headers["Authorization"] = f"Bearer {key}"
    parts = urlsplit(url)
    ours = parts.hostname in LOOPBACK
    return {
        "base_url": url,
        "headers": headers,
        "timeout": httpx.Timeout(timeout, connect=min(CONNECT_S, timeout)),
        # A proxy that the environment names does not know the way to this computer's own services.
        "trust_env": not ours,
        # To read whom to trust takes longer than most requests; where no TLS can come, nobody is to be trusted.
        **({"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)} if ours and parts.scheme == "http" else {}),
    }


def request(call: Call) -> dict[str, Any]:
    """Arguments of `request`."""
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.query),
        "content": call.content,
        "headers": dict(call.headers),
    }


def answer(response: httpx.Response) -> Answer:
    return Answer(response.status_code, {k.lower(): v for k, v in response.headers.items()}, response.content)


def lost(error: httpx.RequestError, url: str) -> Lost:
    match error:
        case httpx.ConnectError() if any(isinstance(cause, ssl.SSLError) for cause in _causes(error)):
            return Lost(f"{url} does not speak TLS, or has a certificate that is not trusted ({error}).")
        case httpx.ConnectError() | httpx.ConnectTimeout():
            return Lost(f"Nothing answers at {url}; is the service running there? `fewshot serve` starts one.")
        case httpx.TimeoutException():
            return Lost(f"The service at {url} did not answer in time.", timed_out=True)
        case _:
            return Lost(f"The connection to {url} broke ({type(error).__name__}).")


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
