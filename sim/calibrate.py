"""``python -m sim.calibrate TABLE``: constants of the grouped GEMM law that fit a measured table, and how well.

Argument parsing and messages; the work is in `sim.calibration`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.console import guarded

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.calibrate",
        description="Fit the grouped GEMM constants of a device to a table of measured MoE kernels, or those of dense GEMM and attention.",
        epilog="exit status: 0 done, 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument(
        "table",
        metavar="TABLE",
        help=".parquet or .csv. MoE: aiconfigurator moe_perf, InferSim grouped_gemm, aiter tuned_fmoe, Frontier's "
        "moe.csv (Vidur's layout). Dense products: aiconfigurator gemm_perf, Vidur mlp.csv. Attention: aiconfigurator "
        "context and generation of mla and attention",
    )
    p.add_argument("--device", metavar="NAME|FILE", help="cluster file of the GPU, or its name in scenarios/clusters (default: the one that TABLE's name holds)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print everything as one JSON object instead of the table")
    p.add_argument("--out", metavar="FILE.yaml", help="where the kernels block goes (default: printed below the table)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded("python -m sim.calibrate", lambda: _main(args), "interrupted; nothing was written")


def _main(args: argparse.Namespace) -> int:
    from sim.calibration import kernels, readers, report

    single = kernels.load(args.table)
    if single is not None:
        return _kernels(args, single)
    layout, rows = readers.read(args.table)
    name, device = _device(args.device, args.table)
    result = report.calibrate(rows, device, os.path.basename(args.table))
    block = report.block(result)
    if args.out:
        Path(args.out).write_text(report.heading(args.table, device) + block, encoding="utf-8")
    if args.json:
        data: dict[str, Any] = {"table": args.table, "layout": layout, "device": device.name, "cluster": name}
        print(json.dumps(data | report.as_data(result), indent=1))
    else:
        print(f"{args.table}: {layout} layout, {device.name}\n\n{report.table(result)}")
        if not args.out:
            print(f"\n{block}", end="")
    return 0


def _kernels(args: argparse.Namespace, table: Any) -> int:
    """Fit a table of dense products or attention."""
    from dataclasses import asdict

    from sim.calibration import kernels

    name, device = _device(args.device, args.table)
    fits, left_out = kernels.fit_table(table, device, f"{os.path.basename(args.table)}, fit")
    block = kernels.block(fits)
    if args.out:
        Path(args.out).write_text(block, encoding="utf-8")
    if args.json:
        found = [
            {name: None if value != value else value for name, value in asdict(fit).items()}
            | {"warning": fit.warning, "constants": fit.constants.model_dump(exclude_none=True)}
            for fit in fits
        ]
        data = {"table": args.table, "device": device.name, "cluster": name, "kernels": found, "left_out": left_out}
        print(json.dumps(data, indent=1))
        return 0
    print(f"{args.table}: {device.name}\n")
    for fit in fits:
        print(f"{fit.key:12} {kernels.summary(fit)}")
        if fit.warning:
            print(f"{'':12} warning: {fit.warning}")
    for key, reason in left_out.items():
        print(f"{key:12} left out: {reason}")
    if not args.out:
        print(f"\n{block}", end="")
    return 0


def _device(given: str | None, table: str) -> tuple[str, Any]:
    """Return the cluster's name and its device; ValueError where neither ``given`` nor the table's name tells it."""
    from sim.cluster import Cluster
    from sim.yamlfile import read, validate

    folder = SCENARIOS / "clusters"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    path = folder / f"{given}.yaml"
    if given is None:
        where = os.path.abspath(table)
        # The file's own name counts before its folders, h800 before h800_2048.
        words = [_words(os.path.basename(where)), _words(where)]
        order = sorted(known, key=lambda name: (len(name), name))
        found = next((name for text in words for name in order if _told(name, text)), None)
        if found is None:
            raise ValueError(
                f"{table}: the name does not tell the GPU; give --device, one of {', '.join(known)}, or a file"
            )
        path = folder / f"{found}.yaml"
    elif given not in known:
        if not os.path.isfile(given):
            raise ValueError(f"--device must be one of {', '.join(known)}, or a cluster file [got {given!r}]")
        path = Path(given)
    cluster = validate(Cluster, read(path, root=SCENARIOS if path.parent == folder else None))
    return path.stem, cluster.device


def _words(text: str) -> str:
    return f"_{re.sub('[^a-z0-9]+', '_', text.lower())}_"


def _told(name: str, words: str) -> bool:
    """Return whether a cluster's GPU, its name up to the first number, is in ``words``: rtx_pro_6000 or rtxpro6000."""
    found = re.match(r"\D*[^_]*", name)
    gpu = found[0] if found else name
    return f"_{gpu}_" in words or f"_{gpu.replace('_', '')}_" in words


if __name__ == "__main__":
    sys.exit(main())
