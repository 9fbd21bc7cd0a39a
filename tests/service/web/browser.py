"""A Chromium for tests of the page, and the things a person does there: drop, paste, hold to the camera.

Everything that would be wrong anywhere is watched on every page: errors of the console and of scripts, requests that
the page's policy forbids, requests to other addresses. Knows nothing of what the page is for.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
WAIT_MS = 30_000  # for what the service does; the machine may be busy
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
DROP = """([node, files]) => {
  const transfer = new DataTransfer();
  for (const {name, type, data} of files) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], name, {type}));
  }
  for (const type of ["dragenter", "dragover", "drop"]) {
    node.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
  }
}"""
COPY = """async (data) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
}"""


def _missing(reason: str) -> None:
    if "browser" in os.environ.get("FEWSHOT_TEST_REQUIRE", "").split(","):
        pytest.fail(f"{reason}, and FEWSHOT_TEST_REQUIRE names browser", pytrace=False)
    pytest.skip(reason)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium. Where there is none, the test is skipped, or fails if it was to be run."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        _missing(f"none of {', '.join(PROGRAMS)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed")
    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
        browser = playwright.chromium.launch(executable_path=program, args=[*sandbox, *CAMERA])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page in a context of its own, and what went wrong on it."""

    def __init__(self, browser: Browser, address: str, **context: Any):
        self.address = address
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(WAIT_MS)
        self.page: Page = self.context.new_page()
        self.wrong: list[str] = []
        self.expected: list[str] = []  # parts of what may stand in the console
        self.requests: list[Request] = []
        self.disturbed = False  # Chromium has given up all that was under way, for no fault of the page
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("request", self._asked)

    def _said(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if "ERR_NETWORK_CHANGED" in text:  # another program has made a network, such as that of a container
            self.disturbed = True
        elif message.type in ("error", "warning") and not any(part in text for part in self.expected):
            self.wrong.append(f"console: {text}")

    def _asked(self, request: Request) -> None:
        self.requests.append(request)
        own = urlsplit(self.address)
        url = urlsplit(request.url)
        if url.scheme not in ("blob", "data") and (url.scheme, url.netloc) != (own.scheme, own.netloc):
            self.wrong.append(f"request to {request.url}")

    def open(self, hash: str = "") -> Page:
        self.page.goto(f"{self.address}/{hash}")
        there = self.page.locator(".box").first
        while True:
            self.disturbed = False
            try:
                there.wait_for()
                return self.page
            except Exception:
                if not self.disturbed:
                    raise
                self.page.reload()

    def sent(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.url]


def drop(node: Locator, files: Sequence[Path | tuple[str, bytes]]) -> None:
    """Drops files, as a person does who drags them from a folder."""
    pairs = [(file.name, file.read_bytes()) if isinstance(file, Path) else file for file in files]
    rows = [
        {"name": name, "type": "image/*", "data": base64.b64encode(data).decode()} for name, data in pairs
    ]  # the type of a dropped file comes from its name, and is not to be believed
    node.page.evaluate(DROP, [node.element_handle(), rows])


def paste(page: Page, picture: bytes) -> None:
    """Copies a picture and presses Ctrl+V."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(COPY, base64.b64encode(picture).decode())
    page.keyboard.press("Control+V")
