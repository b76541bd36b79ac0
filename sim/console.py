"""How a front door ends: exit status and one line on stderr instead of a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable


def guarded(program: str, job: Callable[[], int], interrupted: str) -> int:
    """Return the exit status of ``job``: its own, 130 after Ctrl-C (saying ``interrupted``), 2 for bad input, 1 if the
    reader of stdout has gone."""
    try:
        status = job()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        discard_output()
        return 1
    except (OSError, ValueError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


def discard_output() -> None:
    """Drop what is still buffered, so that leaving Python does not try to write it again."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
