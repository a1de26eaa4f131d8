"""What a reader may not do while a case is read: open other files, run code, load packages, or take too long."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Guard", "TooLong", "Trespass", "guard"]

_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
    "os.startfile",
)
_REACH = ("socket.connect", "socket.bind", "pickle.find_class", "ctypes.dlopen", "sys.addaudithook", "webbrowser.open")
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
_FORBIDDEN = frozenset((*_CODE, *_REACH, *_CHANGES))


class Trespass(BaseException):
    """A reader did what it may not do. No ``Exception``: readers must not take it for one of theirs."""


class TooLong(BaseException):
    """A case took more than its time."""


class Guard:
    """Watches this process by an audit hook, which stays for as long as the process, and idles between cases.

    It sees what Python opens. Files that safetensors opens in Rust, Python opens afterwards.

    Attributes:
        trespasses: of the case that is watched, or was last.
    """

    def __init__(self) -> None:
        self.trespasses: list[str] = []
        self._roots: tuple[str, ...] = ()
        self._is_on = False
        sys.addaudithook(self._audit)

    @contextmanager
    def watching(self, readable: Sequence[Path], limit_seconds: float) -> Iterator[None]:
        """Raise what a reader may not do meanwhile.

        Args:
            readable: directories whose files may be opened for reading.
            limit_seconds: by the clock.

        Raises:
            Trespass: it did what it may not do. A reader may swallow it: ``trespasses`` holds it all the same.
            TooLong: at the end of its time.
        """
        self.trespasses = []
        self._roots = tuple(f"{os.path.realpath(path).rstrip(os.sep)}{os.sep}" for path in readable)
        before = signal.signal(signal.SIGALRM, _stop)
        signal.setitimer(signal.ITIMER_REAL, limit_seconds)
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        if event == "open":
            self._opened(*arguments[:3])
        elif event == "import":
            self._imported(arguments[0])
        elif event in _FORBIDDEN:
            self._refuse(f"{event} {arguments!r}"[:200])

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        name = os.path.realpath(os.fsdecode(path))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or (mode and set(mode) & set("wax+")):
            self._refuse(f"writes {name}")
        if not name.startswith(self._roots) and not name.startswith((sys.prefix, sys.base_prefix)):
            self._refuse(f"opens {name}")

    def _imported(self, module: str) -> None:
        """A package that is loaded already may load more of its own, as torch does."""
        package = module.partition(".")[0]
        if package not in sys.modules and package not in sys.stdlib_module_names:
            self._refuse(f"imports {module}")
        if package in {"antigravity", "this", "pty", "webbrowser"}:
            self._refuse(f"imports {module}")

    def _refuse(self, what: str) -> None:
        self.trespasses.append(what)
        raise Trespass(what)


def _stop(signal: int, frame: object) -> None:
    raise TooLong


@cache
def guard() -> Guard:
    """The one of this process: hooks cannot be taken away again."""
    return Guard()


def peak_bytes() -> int:
    """The most memory that the process has ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
