"""``python -m sim.reference``: write the reference pages, or check that they are what the code says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sim.console import guarded
from sim.reference import FOLDER, pages, stale


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.reference",
        description="Write the pages of sim/docs/reference from the code.",
        epilog="exit status: 0 done, 1 a page is out of date (--check), 2 bad input, 130 interrupted",
    )
    p.add_argument("--check", action="store_true", help="write nothing; name the pages that are out of date")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded("python -m sim.reference", lambda: _check() if args.check else _write(), "interrupted")


def _check() -> int:
    old = stale()
    for name in old:
        print(f"{name} is out of date: run python -m sim.reference", file=sys.stderr)
    return 1 if old else 0


def _write() -> int:
    made = pages()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(made)} pages in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
