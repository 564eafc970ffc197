"""A headless Chromium, driven over its DevTools protocol: what a page logs, and how it looks at a width."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--hide-scrollbars", "--disable-background-networking", "--remote-debugging-pipe")  # fmt: skip
# The browser reads commands from descriptor 3 and writes answers to 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
TIMEOUT_S = 120.0

LOOK = """(() => {
  const width = document.documentElement.clientWidth;
  const clips = e => getComputedStyle(e).overflowX !== 'visible';
  const inScroll = e => { for (; e; e = e.parentElement) if (clips(e)) return true; };
  const isBlock = e => e.clientWidth && getComputedStyle(e).display !== 'inline';
  const name = e => `${e.tagName.toLowerCase()}.${e.className}: ${(e.textContent || '').trim().slice(0, 60)}`;
  const all = [...document.body.querySelectorAll('*')].filter(e => !e.closest('svg') && e.getClientRects().length);
  const isCut = (node, word, at) => {
    const range = document.createRange();
    range.setStart(node, at);
    range.setEnd(node, at + word.length);
    return range.getClientRects().length > 1;
  };
  const cut = [...document.querySelectorAll('.numbers b')].map(e => e.firstChild).filter(Boolean).flatMap(node =>
    [...node.data.matchAll(/\\S+/g)].filter(found => isCut(node, found[0], found.index)).map(found => found[0]));
  return {
    cut,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt || i.src.slice(0, 60)),
    images: document.images.length,
    plots: document.querySelectorAll('svg').length,
    scales: [...document.querySelectorAll('svg')].filter(s => s.getClientRects().length && s.viewBox.baseVal)
      .map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width),
    scrolls: document.documentElement.scrollWidth > width,
    wide: all.filter(e => e.getBoundingClientRect().right > width + 1 && !inScroll(e.parentElement)).map(name),
    spilled: all.filter(e => isBlock(e) && !clips(e) && e.scrollWidth > e.clientWidth + 1).map(name),
  };
})()"""


def find_browser() -> str | None:
    """The path of a Chromium: $CHROMIUM, or the first of the usual names; None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Look:
    """What one page is like at one width.

    Args:
        errors: messages of the console and of the browser, and addresses that the page asks for.
        broken: pictures that cannot be shown.
        cut: words in tiles that go on in the next line.
        images: number of pictures.
        plots: number of inline plots.
        scales: pixels per unit of each plot that is shown.
        scrolls: whether the page scrolls horizontally.
        wide: elements that end right of the window.
        spilled: elements whose content is wider than they are.
    """

    errors: list[str]
    broken: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    images: int = 0
    plots: int = 0
    scales: list[float] = field(default_factory=list)
    scrolls: bool = False
    wide: list[str] = field(default_factory=list)
    spilled: list[str] = field(default_factory=list)


class Browser:
    """One process of Chromium with one tab; use it in a `with` block."""

    def __init__(self, program: str) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write)]  # away from 3 and 4
        command = [sys.executable, "-c", START, *map(str, ends), program, *ARGUMENTS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={self._folder.name}"], pass_fds=ends, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (read, write, *ends):
            os.close(end)
        self._buffer, self._last, self._events = b"", 0, list[dict[str, Any]]()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{part}.enable", self._session)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._folder.cleanup()

    def look(self, page: Path, width: int, picture: Path | None = None) -> Look:
        """Open a page in a window of a width in CSS pixels; save what is seen to `picture`, a PNG file."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", self._session, **metrics)
        self._events.clear()
        address = page.resolve().as_uri()
        self._call("Page.navigate", self._session, url=address)
        self._wait_for("Page.loadEventFired")
        found = self._call("Runtime.evaluate", self._session, expression=LOOK, returnByValue=True)["result"]["value"]
        if picture is not None:
            import base64

            shot = self._call("Page.captureScreenshot", self._session, captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        return Look(errors=list(filter(None, (_error(event, address) for event in self._events))), **found)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol to the tab."""
        return self._call(method, self._session, **parameters)

    def value(self, expression: str) -> Any:
        """The value of an expression in JavaScript, in the page that is open; RuntimeError if it throws."""
        found = self._call(
            "Runtime.evaluate", self._session, expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def drag(self, *places: tuple[float, float]) -> None:
        """Press the mouse at the first place, in CSS pixels of the window, move it over the others, and release it."""
        moves = [(place, "mouseMoved") for place in places]
        steps = [moves[0], (places[0], "mousePressed"), *moves[1:], (places[-1], "mouseReleased")]
        for (x, y), kind in steps:
            button = "none" if kind == "mouseMoved" and (x, y) == places[0] else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=int(button == "left"),
                      clickCount=int(kind != "mouseMoved"))  # fmt: skip

    def click(self, selector: str) -> None:
        """Click on the middle of the first element that a CSS selector finds."""
        self.drag(
            tuple(
                self.value(f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{block: 'center'}});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
            )
        )

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        content = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        os.write(self._out, content)
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer within {TIMEOUT_S:g} s")
            content = os.read(self._in, 1 << 20)
            if not content:
                raise RuntimeError("the browser ended")
            self._buffer += content
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


def _error(event: dict[str, Any], address: str) -> str | None:
    """What an event says went wrong; None if nothing did. A page that stands alone asks for no address but its own."""
    method, values = event.get("method"), event.get("params", {})
    if method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
        return f"console: {[argument.get('value') for argument in values['args']]}"
    if method == "Runtime.exceptionThrown":
        details = values["exceptionDetails"]
        return f"exception: {details.get('exception', {}).get('description') or details['text']}"
    if method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
        return f"{values['entry']['source']}: {values['entry']['text']}"
    if method == "Network.requestWillBeSent":
        url = str(values["request"]["url"])
        return None if url.partition("#")[0] == address or url.startswith(("data:", "blob:")) else f"asks for {url}"
    return None
