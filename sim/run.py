"""``python -m sim.run FILE``: the main job. Argument parsing and messages, nothing else."""

from __future__ import annotations

import argparse
import shlex
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sim.console import guarded

INTERRUPTED = 130


LONG_S = 30.0
"""A run that is expected to last longer says so, whoever listens."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.run",
        description="Simulate MoE gating policies on a cluster: balance, bytes and time per policy.",
        epilog="exit status: 0 done, 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument("files", nargs="*", metavar="FILE", help="scenario YAML, e.g. scenarios/v3.yaml")
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value, e.g. --set policies.0.select.topk_group=2 (repeatable)")  # fmt: skip
    p.add_argument("--seed", type=int, help="same as --set seed=N")
    p.add_argument("--replicas", type=int, help="same as --set replicas=N")
    p.add_argument("--jobs", type=int, help="processes (default: all cores where that pays)")
    p.add_argument("--out", default="results", help="folder for results (default: %(default)s); - writes none")
    p.add_argument("--report", action="store_true", help="also write report.html, one page to read and to pass on")
    p.add_argument("--timeline", action="store_true", help="also write timeline.json.gz, the last step or the service for ui.perfetto.dev")  # fmt: skip
    p.add_argument(
        "--dry-run", action="store_true", help="check, print the estimate and the resolved scenario, and stop"
    )
    p.add_argument("--force", action="store_true", help="run even if the estimate says it is too big")
    p.add_argument("--allow-outside", action="store_true", help="let files named in a scenario lie outside its folder")
    p.add_argument("--list", action="store_true", help="list every plug-in kind and stop")
    p.add_argument("--schema", action="store_true", help="print the JSON Schema of scenario files and stop")
    p.add_argument("--quiet", action="store_true", help="no progress, no path of the results")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    args.command = shlex.join(["python", "-m", "sim.run", *(sys.argv[1:] if argv is None else argv)])
    interrupted = "interrupted; nothing of the run in progress was written"
    return guarded("python -m sim.run", lambda: _main(args), interrupted, bad=(OSError,))


def _main(args: argparse.Namespace) -> int:
    if args.schema:
        import json

        from sim.catalogue import schema

        print(json.dumps(schema(), indent=1))
        return 0
    if args.list:
        from sim.catalogue import listing

        print(listing())
        return 0
    if not args.files:
        print("python -m sim.run: no scenario given; try: python -m sim.run scenarios/tiny.yaml", file=sys.stderr)
        return 2
    if args.out == "-" and (args.report or args.timeline):
        print("--report and --timeline write into the folder of results, and --out - writes none", file=sys.stderr)
        return 2
    if args.jobs is not None and args.jobs < 1:
        print(f"--jobs must be at least 1 [got {args.jobs}]", file=sys.stderr)
        return 2
    from concurrent.futures import BrokenExecutor

    from sim.estimate import TooBig, estimate
    from sim.loading import load
    from sim.yamlfile import ScenarioError

    overrides = list(args.overrides)
    overrides += [f"{name}={value}" for name in ("seed", "replicas") if (value := getattr(args, name)) is not None]
    scenarios, bad = [], False
    for file in args.files:
        try:
            scenarios.append(load(file, overrides, allow_outside=args.allow_outside))
        except ScenarioError as error:
            print(error, file=sys.stderr)
            bad = True
    if bad:
        return 2
    status = 0
    for scenario in scenarios:
        expected = estimate(scenario)
        if args.dry_run:
            from sim.report import describe
            from sim.store import resolved_data
            from sim.yamlfile import dump

            print(f"# would run: {expected}" + (f"\n# too big: {expected.reason}" if expected.too_big else ""))
            print("\n".join(f"# {line}" for line in describe(scenario)))
            print(dump(resolved_data(scenario)), end="")
            continue
        if expected.too_big and not args.force:
            print(f"{scenario.name}: too big: {TooBig(expected)}; --force runs it all the same", file=sys.stderr)
            return 2
        try:
            failed = _run(scenario, args, expected)
        except BrokenPipeError:
            raise
        except (OSError, ValueError) as error:
            print(f"{scenario.name}: {error}", file=sys.stderr)
            return 2
        except (MemoryError, BrokenExecutor) as error:  # a worker killed for memory breaks the pool
            print(f"{scenario.name}: ran out of memory, or lost a process: {error}; try fewer --jobs", file=sys.stderr)
            return 1
        status = max(status, failed)
        if failed == INTERRUPTED:
            break
    return status


def _run(scenario: Any, args: argparse.Namespace, expected: Any) -> int:
    """Run one scenario, store and print it. Returns the exit status."""
    import time

    from sim.report import terminal
    from sim.store import check_writable, write
    from sim.study import simulate

    if args.out != "-":
        check_writable(args.out)
    started = time.monotonic()
    heard = not args.quiet and (sys.stderr.isatty() or expected.seconds > LONG_S)
    if heard:
        print(f"{scenario.name}: {expected}", file=sys.stderr)
    result = simulate(scenario, args.jobs, expected, progress=heard, record=args.timeline)
    try:
        if args.out != "-":
            folder = write(result, args.out, time.monotonic() - started)
            if not args.quiet:
                print(f"results: {folder} ({time.monotonic() - started:.1f} s)", file=sys.stderr)
            return _extras(result, args, folder)
        return 0
    finally:  # a full disk does not cost the figures, a closed pipe does not cost the folder
        print(terminal(result))


def _extras(result: Any, args: argparse.Namespace, folder: Path) -> int:
    """Add to a stored run the files that were asked for beside the tables. Returns the exit status: whatever goes wrong in
    making them is a line on stderr and costs the run nothing."""
    from sim.store import add

    status = 0
    for name, make in _asked(result, args):
        try:
            add(folder, {name: make()})
        except KeyboardInterrupt:
            print(f"interrupted while making {name}; the results are in {folder}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            print(f"{result.scenario.name}: no {name}: {type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        else:
            if not args.quiet:
                print(f"{name.partition('.')[0]}: {folder / name}", file=sys.stderr)
    return status


def _asked(result: Any, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Files by name, and what makes them."""
    if args.report:
        from sim.report.html import page

        yield "report.html", lambda: page(result, args.command).encode()
    if args.timeline and result.recorded:
        from sim.timeline import chrome_trace, left_out

        yield "timeline.json.gz", lambda: chrome_trace(result)
        if not args.quiet and (omitted := left_out(result)):
            print(omitted, file=sys.stderr)
    elif args.timeline:
        print(f"{result.scenario.name}: no timeline: no step is timed (steps.timed: none)", file=sys.stderr)


class _Callable(types.ModuleType):
    """`sim.run` is this module and, as people write in notebooks, a function: ``sim.run("scenarios/v3.yaml")``."""

    def __call__(self, source: Any, **options: Any) -> Any:
        from sim.study import run

        return run(source, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
