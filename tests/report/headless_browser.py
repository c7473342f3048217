"""A headless Chromium on a pipe, without any package: enough to look at one file."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--remote-debugging-pipe",
)


@dataclass
class Page:
    """One tab, driven over the DevTools protocol (JSON messages, each ended by a zero byte)."""

    to_browser: IO[bytes]
    from_browser: IO[bytes]
    session: str | None = None
    count: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come first are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.to_browser.write(json.dumps(message).encode() + b"\0")
        self.to_browser.flush()
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self) -> dict[str, Any]:
        """Wait for the next message."""
        message = bytearray()
        while (byte := self.from_browser.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("chromium has ended")
            message += byte
        return json.loads(message)

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of that size and wait until it is complete."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.evaluate("chartsDrawn.then(() => true)")

    def press(self, key: str, text: str = "") -> None:
        """Press and release one key, as named by the DevTools protocol."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}
        code = codes.get(key, 0)
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text,
                      windowsVirtualKeyCode=code)  # fmt: skip

    def screenshot(self, name: str) -> None:
        """Write the whole page to build/screenshots, for people to look at."""
        width, height = (
            self.evaluate(f"document.documentElement.scroll{side}") for side in ("Width", "Height")
        )
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 12_000), "scale": 1}
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(image["data"]))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; promises are waited for."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Return errors and warnings of the console so far."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [
            json.dumps(event["params"]) for event in self.events if event.get("method") in kinds
        ]

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]


@contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium, give its only tab, and end it."""
    if CHROMIUM is None:
        raise RuntimeError("no chromium on this machine")
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        script = f'exec "$0" "$@" 3<&{command_read} 4>&{answer_write}'
        process = subprocess.Popen(
            ["bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(command_read, answer_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        try:
            with os.fdopen(command_write, "wb") as sink, os.fdopen(answer_read, "rb") as source:
                page = Page(sink, source)
                targets = page.call("Target.getTargets")["targetInfos"]
                tab = next(target for target in targets if target["type"] == "page")
                attached = page.call(
                    "Target.attachToTarget", targetId=tab["targetId"], flatten=True
                )
                page.session = attached["sessionId"]
                yield page
        finally:
            process.terminate()
            process.wait(timeout=20)


if __name__ == "__main__":  # the README's picture: results/report.html docs/images/report.png
    import sys

    source, target = (Path(argument).resolve() for argument in sys.argv[1:])
    with browser() as page:
        page.open(source, width=1400, height=980)
        whole = page.call("Page.captureScreenshot", captureBeyondViewport=False)
        target.write_bytes(base64.b64decode(whole["data"]))
