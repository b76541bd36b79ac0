"""``python -m sim.optimize FILE --vary KEY=VALUES``: where a scenario is best, found with few runs.

From Python: ``sim.optimize("scenarios/tiny.yaml", vary={"cluster.nodes": [2, 4]}, minimize=["step_time_s"]).pareto``.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sim.console import guarded

if TYPE_CHECKING:
    from sim.optimizing import Front

PROGRAM = "python -m sim.optimize"
LIBRARY = "optimisation needs a library that is not installed: pip install 'gatesim[optimize]'"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Search axes and policies of a scenario for the best figures (Optuna: NSGA-II, or TPE for one goal), and "
        "print the Pareto front: the runs that no other beats in every goal. Metrics are those of summary.csv, in SI units.",
        epilog="exit status: 0 done, 1 a worker was lost, 2 bad input, 130 interrupted (--resume goes on)",
    )
    p.add_argument(
        "file", metavar="FILE", help="scenario YAML; its sweep: block says what is varied unless --vary does"
    )
    p.add_argument("--vary", action="append", default=[], metavar="KEY=VALUES", help="an axis, as in sim.sweep: 4,8,16 or 1:8 or 0:1:0.1 or 0.1:0.9 or 1e-4:1e-1:log (repeatable); the policy is one more")  # fmt: skip
    p.add_argument("--minimize", action="extend", nargs="+", default=[], metavar="METRIC", help="goals, e.g. step_time_s max_vio_batch")  # fmt: skip
    p.add_argument("--maximize", action="extend", nargs="+", default=[], metavar="METRIC", help="goals, e.g. kept_affinity; with no goal at all: time, balance, kept affinity, memory and money, as far as the scenario has them")  # fmt: skip
    p.add_argument("--subject-to", action="extend", nargs="+", default=[], metavar="LIMIT", help='what has to hold, e.g. "kept_affinity>=0.97" (repeatable)')  # fmt: skip
    p.add_argument("--policy", dest="policies", action="extend", nargs="+", default=[], metavar="NAME", help="policies to choose from (default: all)")  # fmt: skip
    p.add_argument("--trials", type=int, default=100, metavar="N", help="different runs to make (default: %(default)s); what cannot run does not count")  # fmt: skip
    p.add_argument("--batch", type=int, default=16, metavar="N", help="trials suggested at a time (default: %(default)s): more keeps more processes busy, fewer learn more from each; results depend on it, and never on --jobs")  # fmt: skip
    p.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value everywhere (repeatable)")  # fmt: skip
    p.add_argument("--replicas", type=int, help="same as --set replicas=N")
    p.add_argument(
        "--seed", type=int, default=0, help="of the search, not of the runs (--set seed=N; default: %(default)s)"
    )
    p.add_argument("--jobs", type=int, help="runs at a time (default: all cores where that pays)")
    p.add_argument("--backend", default="local", help="who runs them: local (processes here), ray, dask")
    p.add_argument("--address", help="head of a ray or dask cluster; without it they start one here")
    p.add_argument(
        "--name", default="optimize", help="the search's folder under results/SCENARIO (default: %(default)s)"
    )
    p.add_argument("--out", default="results", help="folder for results (default: %(default)s); - writes none")
    p.add_argument(
        "--resume", action="store_true", help="go on with a search that was interrupted, or with more --trials"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a search of this name")
    p.add_argument("--force", action="store_true", help="run what the estimate says is too big")
    p.add_argument("--allow-outside", action="store_true", help="let files named in a scenario lie outside its folder")
    p.add_argument("--quiet", action="store_true", help="no progress, no path of the results")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    kept = "" if args.out == "-" else "; the runs that ended are kept: --resume goes on"
    return guarded(PROGRAM, lambda: _main(args), f"interrupted{kept}")


def _main(args: argparse.Namespace) -> int:
    from sim.optimizing.work import TrialLost
    from sim.report.fronts import table
    from sim.yamlfile import ScenarioError

    overrides = list(args.overrides) + ([] if args.replicas is None else [f"replicas={args.replicas}"])
    keys = ("minimize", "maximize", "subject_to", "policies", "trials", "batch", "seed", "allow_outside", "force")
    try:
        front = _run(
            args.file,
            _axes().from_texts(args.vary),
            overrides,
            None if args.out == "-" else args.out,
            args.name,
            {key: getattr(args, key) for key in keys},
            {key: getattr(args, key) for key in ("jobs", "backend", "address", "resume", "overwrite")}
            | {"progress": not args.quiet},
        )
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return 2
    except (TrialLost, MemoryError) as error:
        print(str(error) or "ran out of memory; try fewer --jobs", file=sys.stderr)
        return 1
    if front.folder and not args.quiet:
        print(f"results: {front.folder} (pareto.csv, trials.csv; every run: {front.folder / 'runs'})", file=sys.stderr)
    print(table(front))
    return 0 if any(trial.rows for trial in front.tried) else 2


def _axes() -> Any:
    from sim.sweeping import axes

    return axes


def _run(
    source: Any,
    varied: Any,
    overrides: Sequence[str],
    out: Any,
    name: str,
    asked: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Front:
    """Check everything, then search. Raises ScenarioError; ValueError with one line for all else that is refused."""
    from sim import backends
    from sim.loading import opened
    from sim.sweeping.folder import Refused, named
    from sim.sweeping.work import TooLong

    for key in ("trials", "batch", "jobs"):
        value = {**asked, **options}.get(key)
        if value is not None and value < 1:
            raise ValueError(f"--{key} must be at least 1 [got {value}]")
    if options.get("resume") and options.get("overwrite"):
        raise ValueError("--resume and --overwrite exclude each other")
    backends.get(options.get("backend", "local"))
    _axes().not_set_too(varied, overrides)
    try:
        from sim.optimizing.work import question, run

        found = question(opened(source, overrides, allow_outside=asked["allow_outside"]), varied, **asked)
    except ImportError as error:
        if error.name != "optuna":
            raise
        raise ValueError(LIBRARY) from None
    try:
        return run(found, None if out is None else named(out, found.scenario.name, name), **options)
    except (Refused, TooLong) as error:
        raise ValueError(str(error)) from None


def optimize(
    source: Any,
    vary: Mapping[str, Any] | None = None,
    *,
    minimize: Sequence[str] = (),
    maximize: Sequence[str] = (),
    subject_to: Sequence[str] = (),
    policies: Sequence[str] = (),
    trials: int = 100,
    batch: int = 16,
    seed: int = 0,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    replicas: int | None = None,
    out: Any = None,
    name: str = "optimize",
    force: bool = False,
    **options: Any,
) -> Front:
    """Search a scenario (a file, plain data or a `Scenario`) and return its `sim.optimizing.Front`.

    vary: values by key, as in `sim.sweep`. minimize, maximize: names of metrics. subject_to: ``["kept_affinity>=0.97"]``.
    policies: names to choose from; all by default. trials: different runs. seed: of the search. out: folder to write to;
    None: nothing is written. options: ``jobs`` (default: 1), ``backend``, ``address``, ``resume``, ``overwrite``,
    ``progress``. Raises ScenarioError, and ValueError for everything else that is refused.
    """
    import json

    from sim.scenario import Scenario
    from sim.store import resolved_data

    sets = [f"{k}={json.dumps(v)}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else list(overrides)
    sets += [] if replicas is None else [f"replicas={replicas}"]
    asked = {
        "minimize": minimize, "maximize": maximize, "subject_to": subject_to, "policies": policies, "trials": trials,
        "batch": batch, "seed": seed, "allow_outside": False, "force": force,
    }  # fmt: skip
    data = resolved_data(source) if isinstance(source, Scenario) else source
    return _run(data, _axes().from_mapping(vary or {}), sets, out, name, asked, {"jobs": 1} | options)


class _Callable(types.ModuleType):
    """`sim.optimize` is this module and a function, as `sim.run` is."""

    def __call__(self, source: Any, vary: Mapping[str, Any] | None = None, **options: Any) -> Any:
        return optimize(source, vary, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
