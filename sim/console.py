"""How a front door ends: exit status and one line on stderr instead of a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator

INTERRUPT_AGAIN_S = 1.0


def guarded(
    program: str,
    job: Callable[[], int],
    interrupted: str,
    bad: tuple[type[Exception], ...] = (OSError, ValueError),
) -> int:
    """Return the exit status of ``job``: its own, 130 after Ctrl-C or SIGTERM (saying ``interrupted``), 2 for bad input, which
    is an error of the types ``bad``, 1 if the reader of stdout has gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for ±
    try:
        with _interruptible():
            status = job()
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        discard_output()
        return 1
    except bad as error:
        print(f"{program}: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            discard_output()
        return 2


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let a polite kill end like Ctrl-C, and repeat what an import may swallow: some packages catch everything while they
    start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, INTERRUPT_AGAIN_S)
        raise KeyboardInterrupt

    alarm = getattr(signal, "SIGALRM", None)
    numbers = [signal.SIGINT, signal.SIGTERM, *([] if alarm is None else [alarm])]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def discard_output() -> None:
    """Drop what is still buffered, so that leaving Python does not try to write it again."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
