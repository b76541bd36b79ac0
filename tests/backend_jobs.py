"""What workers do in tests of backends; here, because every worker imports it and the tests' own imports take a second."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def square(x: int) -> int:
    return x * x


def fail(x: int) -> int:
    if x == 2:
        from sim.located import Problem, ScenarioError

        raise ScenarioError([Problem("a.yaml:1:1", "seed", "must be a number", "'x'")])
    return x


def first(folder: str) -> bool:
    try:
        os.close(os.open(os.path.join(folder, "tried"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def die_once(job: tuple[str, int]) -> int:
    folder, x = job
    if x == 3 and first(folder):
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def poison(job: tuple[str, int]) -> int:
    folder, x = job
    if x == 3:
        with open(os.path.join(folder, "kills"), "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    return x


def slowly(job: tuple[str, int]) -> int:
    """Say who works on what, then take a while."""
    folder, x = job
    Path(folder, f"{x}-{os.getpid()}-{os.environ.get('NODE', '')}").touch()
    time.sleep(0.4)
    return x


def sleep(path: str) -> None:
    Path(path).touch()
    time.sleep(600)


def kinds(_: None) -> list[Any]:
    from sim.plugin import Plugin

    return [cls.model_fields["kind"].default for cls in Plugin.__subclasses__()]
