"""``python -m sim.sensitivity FILE``: would another policy win if a constant were off by 20 %?

From Python: ``sim.sensitivity("scenarios/tiny.yaml").conclusion``.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.console import guarded

if TYPE_CHECKING:
    from sim.sensitive import Sensitivity

PROGRAM = "python -m sim.sensitivity"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Say which assumptions could change the winner: each constant by itself, how far off it would have to be, "
        "and all at once (Sobol indices). Without --vary: every rate, latency and strength that the scenario assumes, ±20 %.",
        epilog="exit status: 0 done (whatever the answer), 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument("file", metavar="FILE", help="scenario YAML, e.g. scenarios/tiny.yaml")
    p.add_argument("--metric", metavar="NAME", help="what is won by: a metric of summary.csv (default: what the report calls the best by, step_time_s for most)")  # fmt: skip
    p.add_argument("--vary", action="append", default=[], metavar="KEY=RANGE", help="a constant and how far it may be off: KEY=±20%%, KEY=low:high in SI units, or KEY alone for ±20%% (repeatable); KEY is any --set key")  # fmt: skip
    p.add_argument("--samples", type=int, default=32, metavar="N", help="a power of two: N (constants + 2) points for the Sobol indices, 2 N of them independent (default: %(default)s); 0: one at a time only")  # fmt: skip
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value before anything is varied (repeatable)")  # fmt: skip
    p.add_argument("--replicas", type=int, help="same as --set replicas=N: leads then have intervals")
    p.add_argument(
        "--seed", type=int, default=0, help="of the samples; of the runs: --set seed=N (default: %(default)s)"
    )
    p.add_argument("--jobs", type=int, help="processes (default: all cores where that pays)")
    p.add_argument("--out", default="results", help="folder for results (default: %(default)s); - writes none")
    p.add_argument("--force", action="store_true", help="run what the estimate says is too big")
    p.add_argument("--allow-outside", action="store_true", help="let files named in a scenario lie outside its folder")
    p.add_argument("--quiet", action="store_true", help="no progress, no path of the results")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded(PROGRAM, lambda: _main(args), "interrupted; nothing was written")


def _main(args: argparse.Namespace) -> int:
    for name, least in (("jobs", 1), ("samples", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least} [got {value}]")
    from concurrent.futures import BrokenExecutor

    from sim.estimate import TooBig
    from sim.sensitive import ask
    from sim.sensitive.report import text, write
    from sim.store import check_writable
    from sim.yamlfile import ScenarioError

    if args.out != "-":
        check_writable(args.out)
    overrides = list(args.overrides) + ([] if args.replicas is None else [f"replicas={args.replicas}"])
    try:
        found = ask(
            args.file, metric=args.metric, vary=args.vary, overrides=overrides, samples=args.samples, seed=args.seed,
            jobs=args.jobs, force=args.force, allow_outside=args.allow_outside,
            progress=not args.quiet,
        )  # fmt: skip
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return 2
    except TooBig as error:
        print(f"{PROGRAM}: too big: {error}; --force runs it all the same", file=sys.stderr)
        return 2
    except (MemoryError, BrokenExecutor) as error:
        print(f"{PROGRAM}: ran out of memory, or lost a process: {error}; try fewer --jobs", file=sys.stderr)
        return 1
    try:
        if args.out != "-":
            asked = {"vary": args.vary, "samples": args.samples, "seed": args.seed}
            folder = write(found, Path(args.out) / found.scenario.name / "sensitivity", asked)
            if not args.quiet:
                print(f"results: {folder}", file=sys.stderr)
    finally:  # a full disk does not cost the answer
        print(text(found))
    return 0


class _Callable(types.ModuleType):
    """`sim.sensitivity` is this module and a function: ``sim.sensitivity("scenarios/v3.yaml", samples=0)``."""

    def __call__(self, source: Any, **options: Any) -> Sensitivity:
        from sim.sensitive import ask
        from sim.sensitive.ask import options_of

        return ask(source, **options_of(options))


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
