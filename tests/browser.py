"""A real browser for the tests of ``icm review``: the server process, and headless Chromium."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP other.example 127.0.0.1",
)
TIMEOUT_S = 30.0


@dataclass
class ReviewServer:
    """A process of ``icm review`` and the address that it printed."""

    process: subprocess.Popen[str]
    url: str

    @classmethod
    def start(cls, alphas: Path, *flags: str) -> ReviewServer:
        """Start the command on the output folder of a run, and wait until it prints its URL."""
        command = [sys.executable, "-m", "icm_cli.cli", "review", str(alphas), "--no-browser", *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "400"})
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("http://"):
                return cls(process, line.strip())
        raise AssertionError(f"icm review ended with code {process.wait()}")

    @property
    def token(self) -> str:
        return parse_qs(urlsplit(self.url).query)["token"][0]

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    @property
    def origin(self) -> str:
        return f"http://{urlsplit(self.url).netloc}"

    def request(self, method: str, target: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a request exactly as given, with the cookie of the page; return status, headers and content.

        Keyword arguments replace headers; an empty value removes one. ``_`` stands for ``-``.
        """
        content = None if body is None else json.dumps(body).encode()
        sent = {"Host": f"127.0.0.1:{self.port}", "Cookie": f"icm-{self.port}={self.token}"}
        if content is not None:
            sent |= {"Origin": self.origin, "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if value:
                connection.putheader(name, value)
        if content is not None:
            connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content)
        answer = connection.getresponse()
        result = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return result

    def get(self, target: str) -> Any:
        """Send a request that must succeed, and return its JSON content."""
        status, _, content = self.request("GET", target)
        assert status == 200, (target, status, content[:300])
        return json.loads(content)

    def post(self, target: str, body: Any) -> Any:
        """Send a request that must succeed, and return its JSON content."""
        status, _, content = self.request("POST", target, body)
        assert status == 200, (target, status, content[:300])
        return json.loads(content)

    def images(self) -> dict[str, dict[str, Any]]:
        """Return the images of the run by name."""
        return {item["name"]: item for item in self.get("/api/images")["images"]}

    def wait_until_ready(self) -> None:
        """Request the list of images, which starts loading the model, and wait until it is loaded."""
        self.images()
        wait_until(lambda: self.get("/api/run")["model_state"] == "ready", "the model is not ready")

    def kill(self) -> None:
        """Kill the process with SIGKILL, which it cannot handle."""
        self.process.kill()
        self._wait()

    def stop(self) -> None:
        """End the process with SIGTERM, as a farm or a service manager does."""
        self.process.terminate()
        self._wait()

    def _wait(self) -> None:
        assert self.process.stdout is not None
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()


@dataclass
class ReviewPage:
    """A tab of the browser, with the URLs that it requested and its errors."""

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(TIMEOUT_S * 1000)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._keep_error)
        self.page.on("dialog", self._dismiss_dialog)

    def _keep_error(self, message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def _dismiss_dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(CHROMIUM_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def wait_until(condition: Callable[[], bool], message: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until the condition holds; raise AssertionError with the message after the time limit."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.05)
