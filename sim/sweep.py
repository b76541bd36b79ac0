"""``python -m sim.sweep FILE --vary KEY=VALUES``: many points of one scenario, on as many processes as pay.

From Python: ``sim.sweep("scenarios/tiny.yaml", vary={"cluster.nodes": [2, 4]}, replicas=5).summary()``.
"""

from __future__ import annotations

import argparse
import io
import sys
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sim.console import guarded

if TYPE_CHECKING:
    from sim.sweeping.points import Plan

PROGRAM = "python -m sim.sweep"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Run a scenario at many points: every value of every --vary, all policies, several replicas.",
        epilog="exit status: 0 done, 1 a worker was lost, 2 bad input, 130 interrupted (--resume goes on)",
    )
    p.add_argument(
        "file", metavar="FILE", help="scenario YAML; its sweep: block says what is varied unless --vary does"
    )
    p.add_argument("--vary", action="append", default=[], metavar="KEY=VALUES", help="any key of --set, policies.*.KEY (every policy) or gating.KEY (every gate that has it); 4,8,16 or 1:8 or 0:1:0.1, and to draw from 0.1:0.9 or 1e-4:1e-1:log (repeatable)")  # fmt: skip
    p.add_argument("--design", metavar="KIND", help="points to try: grid (all; default), list (axes side by side), latin_hypercube, sobol")  # fmt: skip
    p.add_argument("--points", type=int, metavar="N", help="points that latin_hypercube and sobol draw")
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value at every point (repeatable)")  # fmt: skip
    p.add_argument("--seed", type=int, help="same as --set seed=N")
    p.add_argument("--replicas", type=int, help="same as --set replicas=N")
    p.add_argument("--jobs", type=int, help="points that run at a time (default: all cores where that pays)")
    p.add_argument("--backend", default="local", help="who runs them: local (processes here), ray, dask")
    p.add_argument("--address", help="head of a ray or dask cluster; without it they start one here")
    p.add_argument("--name", default="sweep", help="the sweep's folder under results/SCENARIO (default: %(default)s)")
    p.add_argument("--out", default="results", help="folder for results (default: %(default)s); - writes none")
    p.add_argument("--resume", action="store_true", help="go on with a sweep that was interrupted")
    p.add_argument("--overwrite", action="store_true", help="replace a sweep of this name")
    p.add_argument("--skip-invalid", action="store_true", help="leave out points that cannot run, and list them")
    p.add_argument("--dry-run", action="store_true", help="check all points, print the estimate and the first of them, and stop")  # fmt: skip
    p.add_argument("--force", action="store_true", help="run even if the estimate says it is too big")
    p.add_argument("--allow-outside", action="store_true", help="let files named in a scenario lie outside its folder")
    p.add_argument("--quiet", action="store_true", help="no progress, no path of the results")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for ±
    kept = "" if args.out == "-" else "; the points that are done are kept: --resume goes on"
    return guarded(PROGRAM, lambda: _main(args), f"interrupted{kept}")


def _main(args: argparse.Namespace) -> int:
    for name in ("jobs", "points"):
        if (value := getattr(args, name)) is not None and value < 1:
            print(f"--{name} must be at least 1 [got {value}]", file=sys.stderr)
            return 2
    if args.resume and args.overwrite:
        print("--resume and --overwrite exclude each other", file=sys.stderr)
        return 2
    from sim import backends
    from sim.report.sweeps import table
    from sim.sweeping import axes
    from sim.sweeping.folder import Refused, named
    from sim.sweeping.points import BadPoints
    from sim.sweeping.study import prepared
    from sim.sweeping.work import PointLost, TooLong, run
    from sim.yamlfile import ScenarioError

    backends.get(args.backend)
    overrides = list(args.overrides)
    overrides += [f"{name}={value}" for name in ("seed", "replicas") if (value := getattr(args, name)) is not None]
    try:
        plan = prepared(
            args.file,
            axes.from_texts(args.vary),
            overrides,
            design=args.design,
            points=args.points,
            skip_invalid=args.skip_invalid,
            allow_outside=args.allow_outside,
            progress=not args.quiet and sys.stderr.isatty(),
        )
    except BadPoints as error:
        print(error, file=sys.stderr)
        print("nothing was run; --skip-invalid leaves out points that cannot", file=sys.stderr)
        return 2
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return 2
    if args.dry_run:
        print("\n".join(_dry(plan)))
        return 0
    folder = None if args.out == "-" else named(args.out, plan.scenario.name, args.name)
    if not args.quiet:
        print(f"{plan.scenario.name}: {_count(plan)}", file=sys.stderr)
        if args.resume and folder and not folder.exists():
            print(f"{folder}: nothing to resume, the sweep begins", file=sys.stderr)
    try:
        sweep = run(
            plan,
            folder,
            jobs=args.jobs,
            backend=args.backend,
            address=args.address,
            resume=args.resume,
            overwrite=args.overwrite,
            force=args.force,
            progress=not args.quiet,
        )
    except (Refused, TooLong) as error:
        print(error, file=sys.stderr)
        return 2
    except PointLost as error:
        print(error, file=sys.stderr)
        return 1
    if folder and not args.quiet:
        print(f"results: {folder} (one row per point, policy and replica: {folder / 'runs'})", file=sys.stderr)
    print(table(sweep))
    return 0


def _count(plan: Plan) -> str:
    from sim.sweeping.work import expected
    from sim.units import human

    runs, skipped = len({point.run for point in plan.running}), len(plan.points) - len(plan.running)
    text = f"{len(plan.points)} point{'s' * (len(plan.points) > 1)}" + (
        f", {skipped} of them skipped" if skipped else ""
    )
    drawn = plan.block.points
    text += f" (of {drawn} drawn: the others repeat them)" if drawn and drawn > len(plan.points) else ""
    text += f", {runs} different runs" if runs < len(plan.running) else ""
    found = expected(plan)
    return f"{text}, about {human(found.seconds, 's')} on one core, {human(found.memory_bytes, 'B')} of memory for each process"


def _dry(plan: Plan, rows: int = 20) -> list[str]:
    lines = [f"would run: {_count(plan)}"]
    for point in plan.points[:rows]:
        lines.append(plan.named(point) + (f": skipped: {point.skipped}" if point.skipped else ""))
    return lines + ([f"and {len(plan.points) - rows} more"] if len(plan.points) > rows else [])


class _Callable(types.ModuleType):
    """`sim.sweep` is this module and a function, as `sim.run` is."""

    def __call__(self, source: Any, vary: Mapping[str, Any] | None = None, **options: Any) -> Any:
        from sim.sweeping.study import sweep

        return sweep(source, vary, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
