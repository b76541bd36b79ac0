"""``python -m sim.fit TRACE``: statistics of recorded routing, beside those of a generator fitted to it.

Argument parsing and messages; the work is in `sim.fitting`, the formats in `sim.traces`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from sim.console import guarded


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.fit",
        description="Measure recorded routing, fit the affinity generator to it, and write the traffic block.",
        epilog="exit status: 0 done, 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument("trace", metavar="TRACE", help="npz, Megatron router .jsonl, SGLang recorder .npz or .json, ESFT .txt or folder")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print everything as JSON, layer by layer, instead of the table")
    p.add_argument("--out", metavar="FILE.yaml", help="where the traffic block goes (default: TRACE's name + _traffic.yaml, here); - prints it")  # fmt: skip
    p.add_argument("--layers", metavar="N,N,...", help="only these layers, by the model's own numbers")
    p.add_argument("--experts", type=int, metavar="E", help="routed experts per layer (default: the file's, else the largest id + 1)")  # fmt: skip
    p.add_argument("--portable", action="store_true", help="a block for any model: popularity as a spread, few knots over the depth")  # fmt: skip
    p.add_argument("--moe-layers", type=int, metavar="N", help="with --portable: MoE layers of the traced model, of which the trace holds the first")  # fmt: skip
    p.add_argument("--validate", action="store_true", help="also fit half of the sequences and half of the layers, and report on the rest")  # fmt: skip
    p.add_argument("--others", nargs="+", default=[], metavar="TRACE", help="also predict TRACE's parameters from fits of these (same layers)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of the simulations that the fit looks at (default: 0)")
    p.add_argument("--jobs", type=int, help="processes (default: all cores)")
    p.add_argument("--quiet", action="store_true", help="no progress, no path of the block")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded("python -m sim.fit", lambda: _main(args), "interrupted; nothing was written")


def _main(args: argparse.Namespace) -> int:
    from sim.fitting import block, report, validate
    from sim.fitting.fit import fit, synthetic_statistics
    from sim.traces import read

    for name, value, least in (
        ("--jobs", args.jobs, 1),
        ("--seed", args.seed, 0),
        ("--moe-layers", args.moe_layers, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least} [got {value}]")
    if args.moe_layers is not None and not args.portable:
        raise ValueError("--moe-layers says where a portable block's knots lie: add --portable")
    trace = _chosen(read(args.trace, args.experts), args.layers, args.trace)
    others = [_chosen(read(other, args.experts), args.layers, other) for other in args.others]
    if args.validate:
        validate.check(trace)
    progress = _Progress(args.quiet)
    fitted = fit(trace, seed=args.seed, jobs=args.jobs, progress=progress.of("fitting layers"))
    synthetic = synthetic_statistics(fitted, validate.SEEDS)
    held_out: dict[str, float] = {}
    if args.validate:
        held_out |= validate.halves(trace, args.seed, args.jobs, progress.of("fitting one half"))
        held_out |= validate.depth(fitted)
    if others:
        fits = [fit(other, seed=args.seed, jobs=args.jobs, progress=progress.of("fitting others")) for other in others]
        held_out |= validate.transfer(fitted, fits)
    data = block.portable_block(fitted, args.moe_layers) if args.portable else block.traffic_block(fitted)
    if args.json:
        print(json.dumps(report.as_data(fitted, synthetic, held_out) | {"traffic": data}, indent=1))
    else:
        print(report.table(fitted, synthetic, held_out))
    text = report.heading(fitted, synthetic, os.path.basename(os.path.normpath(args.trace))) + block.to_yaml(data)
    if args.out == "-":
        if not args.json:
            print(text, end="")
        return 0
    out = args.out or os.path.splitext(os.path.basename(os.path.normpath(args.trace)))[0] + "_traffic.yaml"
    _write(out, text)
    if not args.quiet:
        print(f"traffic block: {out}", file=sys.stderr)
    return 0


def _chosen(trace: Any, layers: str | None, path: str) -> Any:
    if layers is None:
        return trace
    try:
        wanted = [int(number) for number in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers must be numbers separated by commas [got {layers[:40]!r}]") from None
    unknown = [number for number in wanted if number not in trace.layers]
    if unknown or len(set(wanted)) < len(wanted):
        raise ValueError(f"{path}: --layers must be different ones of {list(trace.layers)} [got {wanted}]")
    return trace.part(layers=[trace.layers.index(number) for number in wanted])


def _write(path: str, text: str) -> None:
    """Write the file whole or not at all."""
    folder = os.path.dirname(path) or "."
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".fit-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class _Progress:
    """Bars on stderr, one after the other; none where nobody watches."""

    def __init__(self, quiet: bool) -> None:
        self.disable = True if quiet else None  # None: tqdm looks whether stderr is a terminal

    def of(self, what: str) -> Any:
        from tqdm import tqdm

        bar: Any = None

        def step(done: int, all_: int) -> None:
            nonlocal bar
            bar = bar or tqdm(total=all_, desc=what, unit="layer", leave=False, disable=self.disable)
            bar.update(1)
            if done == all_:
                bar.close()
                bar = None

        return step


if __name__ == "__main__":
    sys.exit(main())
