"""A page in a real browser without a screen: what it looks like, what its DOM is, what it complains of and whom it calls."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LIMIT_S = 30.0
OWN = ("google.com", "googleapis.com", "gvt1.com")
"""Whom a browser calls on its own, whatever page it shows."""


def browser() -> str | None:
    """A browser of the Chromium family on this machine."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Shown:
    """dom: after loading. console: messages of the page and about it. requests: what it asked the network for. background: colour
    of the top left corner, (red, green, blue) of 0 to 1."""

    dom: str
    console: list[str]
    requests: list[str]
    background: tuple[float, float, float]


class _Proxy:
    """Takes the place of the network: remembers the first line of what it is asked for, and answers nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> _Proxy:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            with connection, suppress(OSError):
                connection.settimeout(2)
                self.asked.append(connection.recv(4096).decode(errors="replace").split("\r\n")[0])


def show(page: Path, *, dark: bool = False, size: tuple[int, int] = (1000, 600)) -> Shown:
    """Open a file as a browser does. Raises RuntimeError where there is none."""
    program = browser()
    if program is None:
        raise RuntimeError(f"none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory(prefix="moefold-browser-") as folder, _Proxy() as proxy:
        picture = Path(folder) / "page.png"
        command: list[Any] = [program, "--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars", "--no-first-run"]
        command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
        command += [f"--user-data-dir={folder}/user", f"--proxy-server=http://127.0.0.1:{proxy.port}"]
        # 0 is dark; the setting stands for the system's
        command += ["--blink-settings=preferredColorScheme=0"] * dark
        command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", "--dump-dom", page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
        if not picture.exists():
            raise RuntimeError(f"{program} ended with {done.returncode} and no picture: {done.stderr[-2000:]}")
        background = _corner(picture)
    console = re.findall(r"CONSOLE[^\n]*", done.stderr)
    return Shown(done.stdout, console, [line for line in proxy.asked if not any(host in line for host in OWN)], background)


def _corner(picture: Path) -> tuple[float, float, float]:
    from matplotlib.image import imread

    red, green, blue = (float(v) for v in imread(picture)[2, 2][:3])
    return red, green, blue
