"""Drives Chromium without a window over its debugging pipe, to open pages from disk and inspect them."""

import base64
import json
import os
import select
import shutil
import subprocess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
_OPTIONS += ("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")
_PATIENCE = 60  # seconds for an answer


class Browser:
    """One page of a browser. `events` holds all that the browser has reported since the page was opened."""

    def __init__(self, profile):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ["bash", "-c", script, BROWSER, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        passed = (to_browser, from_browser)
        self._process = subprocess.Popen(command, pass_fds=passed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in passed:
            os.close(end)
        self._buffer, self._number, self.events = b"", 0, []
        targets = self._send("Target.getTargets", None)["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self._send("Target.attachToTarget", None, targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._out)
        os.close(self._in)

    def send(self, method, **parameters):
        """Sends a command of the protocol to the page and returns its answer."""
        return self._send(method, self._session, **parameters)

    def _send(self, method, session, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self):
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE)
            read = os.read(self._in, 1 << 16) if ready else b""
            if not read:
                raise RuntimeError("the browser has gone, or does not answer")
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path, width, height=900, scheme="light"):
        """Opens a file in a window of this width, in CSS pixels, and colour scheme, and waits until it has loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression):
        """Returns the value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key, code, text=""):
        """Presses and releases a key that types the text."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def screenshot(self, path, **clip):
        """Writes a PNG of the whole page."""
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True, **({"clip": clip} if clip else {}))
        path.write_bytes(base64.b64decode(answer["data"]))
