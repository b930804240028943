"""A real headless Chromium, driven through its debugging pipe: JSON messages with a zero byte after each."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]


class Chromium:
    """One tab. `errors`: what its console said of errors."""

    def __init__(self, folder):
        (read, self.out), (self.into, write) = os.pipe(), os.pipe()
        # the browser reads its file 3 and writes its file 4, which these may be themselves: they are moved up first
        given = [fcntl.fcntl(file, fcntl.F_DUPFD, 10) for file in (read, write)]
        shell = 'exec {} "$@" 3<&{} 4>&{} {}<&- {}>&-'.format(BINARY, *given, *given)
        command = ["/bin/bash", "-c", shell, "chromium", *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=given, stdout=quiet, stderr=quiet)
        for file in (read, write, *given):
            os.close(file)
        self.numbers, self.held, self.session, self.errors = itertools.count(1), b"", None, []
        targets = self.ask("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self):
        while b"\0" not in self.held:
            assert select.select([self.into], [], [], 60)[0], "the browser said nothing for 60 s"
            piece = os.read(self.into, 1 << 16)
            assert piece, "the browser has ended"
            self.held += piece
        one, _, self.held = self.held.partition(b"\0")
        message = json.loads(one)
        kind, said = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and said["entry"]["level"] == "error"):
            self.errors.append(said)
        return message

    def run(self, script):
        """The value of a JavaScript expression."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script):
        end = time.monotonic() + 60
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not true in 60 s: {script}"
            time.sleep(0.05)
        return value

    def open(self, url, width=1400, height=900, dark=False):
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Page.navigate", url=url)
        self.until(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    def type(self, text):
        """Into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press(self, key, code):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text="\r")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def close(self):
        os.close(self.out)
        os.close(self.into)
        self.process.terminate()
        self.process.wait(30)
