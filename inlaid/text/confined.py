"""Chat templates in a process of their own, so that a template takes no more than its share of time and memory.

A template is a program from somebody's folder, and a client's messages and options steer its loops. `Confined` is the
server's side: it keeps a few processes (`python -m inlaid.text.confined FD`), each of which writes out one conversation
at a time. In there a render is ended after `MAX_SECONDS` of CPU time by an exception, and after twice that, where
Python itself is stuck, by the kernel, which ends the process; another is started in its place.
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

MAX_SECONDS = 1.0  # of CPU time for one conversation
MAX_BYTES = 512 << 20  # of memory beyond what an idle process has
_MAX_REASON = 500  # characters of an error
_PATIENCE = 600.0  # seconds until a process that says nothing is ended: on a busy machine its imports take minutes
_MOST = 3  # processes, as many as threads that ask


class TemplateError(ValueError):
    """The template does not write the conversation out; the message says why."""


class TemplateStuck(Exception):
    """The process has neither answered nor used up its CPU time: the machine is at fault, and not the conversation."""


class Confined:
    """A model's chat template in processes of its own. Its methods may be called in threads."""

    def __init__(
        self,
        template: str | dict[str, str],
        special_tokens: Mapping[str, str],
        max_chars: int,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        """Start the first process; `max_chars` bounds what a conversation may become."""
        setting = _Setting(template, dict(special_tokens), max_chars, max_seconds)
        self._setting = msgspec.msgpack.encode(setting)
        self._too_long = _too_long(max_seconds)
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._num_started = 1
        self._idle.put(_Process(self._setting))

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, options: Mapping[str, Any]
    ) -> str:
        """Return the text of a conversation, or raise TemplateError or TemplateStuck."""
        try:
            asked = msgspec.msgpack.encode((messages, tools, options))
        except OverflowError:
            raise TemplateError("a whole number in them is beyond 64 bits") from None
        process = self._take()
        try:
            text = process.render(asked)
        except TimeoutError:
            process.close()
            process = _Process(self._setting)
            raise TemplateStuck(
                f"the process of the chat template has not answered within {_PATIENCE:g} s; try again"
            ) from None
        except (EOFError, OSError) as error:
            process.close()  # one that is closed fails like this again, if no other can be started now
            process = _Process(self._setting)
            raise TemplateError(f"{self._too_long}, or fails in another way that ends its process") from error
        finally:
            self._idle.put(process)
        return text

    def close(self) -> None:
        """End the processes that do nothing."""
        while not self._idle.empty():
            self._idle.get().close()

    def _take(self) -> _Process:
        """Take an idle process, or start another if there are few, or wait."""
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            with self._lock:
                if self._num_started < _MOST:
                    started = _Process(self._setting)
                    self._num_started += 1
                    return started
            return self._idle.get()


class _Process:
    """One process and our end of its connection. It ends when that is closed."""

    def __init__(self, setting: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "inlaid.text.confined", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(setting)

    def render(self, asked: bytes) -> str:
        """Return the text. EOFError, OSError: the process has ended, or says nothing."""
        self._connection.send_bytes(asked)
        if not self._connection.poll(_PATIENCE):
            raise TimeoutError
        done, text = msgspec.msgpack.decode(self._connection.recv_bytes(), type=tuple[bool, str])
        if not done:
            raise TemplateError(text)
        return text

    def close(self) -> None:
        """End the process now."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class _Late(BaseException):
    """The time of a render is over; no template, and no library on its way, catches this."""


class _Setting(msgspec.Struct, frozen=True):
    """The template, and what it may take for one conversation."""

    template: str | dict[str, str]
    special_tokens: dict[str, str]
    max_chars: int
    max_seconds: float


def _too_long(seconds: float) -> str:
    return f"it takes more than {seconds:g} s of CPU time"


def _render(renderer: Any, asked: bytes, setting: _Setting) -> str:
    """Write one conversation out within its time."""
    messages, tools, options = msgspec.msgpack.decode(asked)
    signal.setitimer(signal.ITIMER_PROF, 2 * setting.max_seconds)  # its signal ends the process
    signal.setitimer(signal.ITIMER_VIRTUAL, setting.max_seconds)
    try:
        text: str = renderer.render(messages, tools, options)
    except _Late:
        raise TemplateError(_too_long(setting.max_seconds)) from None
    except MemoryError:
        raise TemplateError(f"it takes more than {MAX_BYTES >> 20} MiB of memory") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    if len(text) > setting.max_chars:
        raise TemplateError(f"it writes {len(text)} characters, more than the context can hold")
    return text


def _answer(renderer: Any, asked: bytes, setting: _Setting) -> bytes:
    """Return True and the text, or False and the reason why there is none."""
    try:
        return msgspec.msgpack.encode((True, _render(renderer, asked, setting)))
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its refusal
        reason = str(error)[:_MAX_REASON] or type(error).__name__
        return msgspec.msgpack.encode((False, reason.encode(errors="backslashreplace").decode()))


def _bound_memory() -> None:
    """Let this process have no more than MAX_BYTES beside what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    most = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS if pages else resource.RLIMIT_DATA, (most, most))


def _on_late(number: int, frame: FrameType | None) -> None:
    raise _Late


_WARMING = _Setting("", {}, 0, 60.0)
_WARMED = msgspec.msgpack.encode(([{"role": "user", "content": ""}], None, {}))


def main() -> int:
    """Write out conversations until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server decides
    signal.signal(signal.SIGVTALRM, _on_late)
    connection = Connection(int(sys.argv[1]))
    from inlaid.text.renderer import Renderer  # not in the server's process

    try:
        setting = msgspec.msgpack.decode(connection.recv_bytes(), type=_Setting)
        renderer = Renderer(setting.template, setting.special_tokens)
        _render(Renderer("", {}), _WARMED, _WARMING)  # imports what a render needs, outside of anybody's time
        _bound_memory()
        while True:
            connection.send_bytes(_answer(renderer, connection.recv_bytes(), setting))
    except (EOFError, ConnectionError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
