"""A headless Chromium for tests, by its DevTools protocol over a pair of pipes: it needs no driver and no package."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SETTINGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--mute-audio",
    "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-pipe",
)
# Becomes the browser, which reads what it is told from the file 3, and answers in the file 4.
WITH_PIPES = """
import fcntl, os, sys
for number, pipe in enumerate([fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]], 3):
    os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {" ": "Space", "Enter": "Enter", "ArrowRight": "ArrowRight", "Escape": "Escape"}


class Browser:
    """One page. `requests` are the addresses it asked for, `complaints` what its console was told of errors."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        told, heard = os.pipe(), os.pipe()
        pipes = [str(told[0]), str(heard[1])]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                WITH_PIPES,
                *pipes,
                CHROMIUM,
                *SETTINGS,
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            pass_fds=(told[0], heard[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(told[0])
        os.close(heard[1])
        self._out, self._in = os.fdopen(told[1], "wb", 0), os.fdopen(heard[0], "rb", 0)
        self._held, self._number, self._page = b"", 0, ""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._page = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._in.close()
        self.process.terminate()
        self.process.wait(20)

    def send(self, method: str, **parameters: Any) -> Any:
        """Ask the browser something; its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._page:
            message["sessionId"] = self._page
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            piece = self._in.read(1 << 16)
            assert piece, "the browser has ended"
            self._held += piece
        message, _, self._held = self._held.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read

    def _note(self, event: dict[str, Any]) -> None:
        told, method = event.get("params", {}), event.get("method")
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            thrown = told["exceptionDetails"]
            self.complaints.append(thrown.get("exception", {}).get("description") or thrown["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(one.get("value", one.get("description"))) for one in told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}".strip())

    def open(self, address: str) -> None:
        """Go to a page."""
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page, which may wait."""
        wrapped = f"(async () => ({script}))()"
        result = self.send("Runtime.evaluate", expression=wrapped, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, f"{script}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait(self, script: str, until: Callable[[Any], bool] = bool, seconds: float = 60.0) -> Any:
        """The value of an expression once it is as wanted."""
        limit = time.monotonic() + seconds
        while True:
            value = self.evaluate(script)
            if until(value):
                return value
            assert time.monotonic() < limit, f"{script} stayed {value!r}; {self.complaints}"
            time.sleep(0.05)

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Choose the size of the page and the colours of the system."""
        scale = 2 if phone else 1
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def save(self, path: Path) -> None:
        """Write a picture of the page."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key and let it go; of `modifiers`, 2 is Ctrl and 8 Shift."""
        code = KEYS.get(key, f"Key{key.upper()}" if key.isalpha() else f"Digit{key}")
        event = {"key": key, "code": code, "modifiers": modifiers}
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        number = {"Enter": 13, " ": 32, "Escape": 27, "ArrowRight": 39}.get(key, ord(key[0].upper()))
        self.send("Input.dispatchKeyEvent", type="keyDown", windowsVirtualKeyCode=number, **text, **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", windowsVirtualKeyCode=number, **event)

    def type(self, selector: str, text: str) -> None:
        """Write into a field."""
        self.evaluate(f"document.querySelector({selector!r}).focus()")
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        box = self.box(selector)
        self.drag((box[0] + box[2] / 2, box[1] + box[3] / 2))

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a field for files."""
        document = self.send("DOM.getDocument")["root"]["nodeId"]
        field = self.send("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=field, files=[str(path)])

    def box(self, selector: str) -> list[float]:
        """Left, top, width and height of an element, brought into view."""
        script = f"""(() => {{ const one = document.querySelector({selector!r});
            one.scrollIntoView({{block: 'nearest', behavior: 'instant'}}); const b = one.getBoundingClientRect();
            return [b.left, b.top, b.width, b.height]; }})()"""
        found: list[float] = self.evaluate(script)
        return found

    def drag(self, *points: tuple[float, float], modifiers: int = 0) -> None:
        """Press the mouse at the first point, and let it go at the last."""
        common = {"button": "left", "clickCount": 1, "modifiers": modifiers, "pointerType": "mouse"}
        (x, y), last = points[0], points[-1]
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, modifiers=modifiers)
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, buttons=1, **common)
        for x, y in points[1:]:
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=1, **common)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=last[0], y=last[1], **common)
