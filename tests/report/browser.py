"""A headless Chromium led over its debugging pipe: JSON messages that end with a zero byte, no package needed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
KEYS = {
    "Tab": {"windowsVirtualKeyCode": 9},
    "Enter": {"windowsVirtualKeyCode": 13, "text": "\r"},
    " ": {"windowsVirtualKeyCode": 32, "text": " "},
    "ArrowRight": {"windowsVirtualKeyCode": 39},
}


class Browser:
    """One tab. A context manager; `requests` holds the addresses the page asked for."""

    def __init__(self, chromium: str, folder: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def wire() -> None:  # the browser reads from 3 and writes to 4
            read, write = os.dup(to_read), os.dup(to_write)
            os.dup2(read, 3)
            os.dup2(write, 4)

        command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._rest, self._number = b"", 0
        self.requests: list[str] = []
        self.loaded = 0
        targets = self._call("Target.getTargets", session=None)["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self._session: str | None = self._call(
            "Target.attachToTarget", {"targetId": page, "flatten": True}, session=None
        )["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._to)
        os.close(self._from)

    def open(self, path: Path, width: int, height: int) -> None:
        """Load a file in a window of this size and wait until its script ran."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        before = self.loaded
        self._call("Page.navigate", {"url": f"file://{path}"})
        while self.loaded == before:
            self._event(self._read())

    def eval(self, script: str) -> Any:
        """Value of an expression in the page."""
        found = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, *keys: str) -> None:
        """Keys as a person presses them."""
        for key in keys:
            for kind in ("keyDown", "keyUp"):
                given = {"type": kind, "key": key, "code": "Space" if key == " " else key, **KEYS[key]}
                if kind == "keyUp":
                    given.pop("text", None)
                self._call("Input.dispatchKeyEvent", given)

    def shot(self, path: Path) -> None:
        """A picture of the window."""
        import base64

        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", {"format": "png"})["data"]))

    def _call(self, method: str, given: dict[str, Any] | None = None, session: str | None = "own") -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": {} if given is None else given}
        if session == "own":
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._event(answer)

    def _event(self, answer: dict[str, Any]) -> None:
        if answer.get("method") == "Network.requestWillBeSent":
            self.requests.append(answer["params"]["request"]["url"])
        if answer.get("method") == "Page.loadEventFired":
            self.loaded += 1

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._from, 1 << 16)
            assert data, "the browser has gone"
            self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        return json.loads(line)


def others(requests: Sequence[str]) -> list[str]:
    """Addresses outside the page itself."""
    return [r for r in requests if not r.startswith(("file://", "data:", "blob:", "about:"))]
