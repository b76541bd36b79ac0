"""``python -m sim.advise placement TRACE|SCENARIO``: is a load balancer worth enabling on this traffic, and how often?

Argument parsing and messages; the work is in `sim.advice`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.console import guarded

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.advise",
        description="Say what is worth doing on your traffic. placement: plan where experts live on the first third of it "
        "(window A), judge on the rest (window B), weigh the gain against moves, stalls and memory.",
        epilog="exit status: 0 done (whatever the verdict), 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument("question", choices=["placement"], help="what to advise on")
    p.add_argument("traffic", metavar="TRACE|SCENARIO", help="recorded expert choices (formats of sim.fit), or a scenario .yaml, whose traffic and gate are run")  # fmt: skip
    p.add_argument("--json", action="store_true", help="print everything as JSON instead of the text")
    p.add_argument("--phase", choices=["prefill", "decode"], help="only this one (default: both)")
    p.add_argument("--model", metavar="NAME|FILE", help="sizes (default: the shipped model that the trace's numbers suggest)")  # fmt: skip
    p.add_argument("--cluster", metavar="NAME|FILE", help="devices and network (default: h100, or the scenario's)")
    p.add_argument(
        "--ep-size", type=int, metavar="N", help="expert-parallel ranks (default: up to 8, or the scenario's)"
    )
    p.add_argument("--redundant", metavar="N,N,...", help="redundant experts to try, multiples of the EP size (default: 0, 1, 2 and 4 per rank)")  # fmt: skip
    p.add_argument("--tokens-per-rank", type=int, metavar="N", help="batch of one rank (default: the scenario's serving unit's, or 128 in decode, 8192 in prefill, less where the trace is short)")  # fmt: skip
    p.add_argument("--interval", type=int, metavar="STEPS", help="steps between two rebalances, such as vLLM's 3000 or SGLang's 1000 (default: ten times what repays one, if plans last)")  # fmt: skip
    p.add_argument("--other-ms", type=float, metavar="MS", help="milliseconds of a step outside the MoE part: attention and all else (default: by the cost laws)")  # fmt: skip
    p.add_argument("--solver-s", type=float, default=1.0, metavar="S", help="host seconds of making a plan and preparing its moves (default: 1, SGLang issue 7879; vLLM issue 37656 has 0.004 to 0.035 for the solver alone)")  # fmt: skip
    p.add_argument("--background", action="store_true", help="plan and move beside serving (vLLM use_async) instead of stalling it")  # fmt: skip
    p.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="cached tokens of a decoding request, and length of a prompt (default: 4096)")  # fmt: skip
    p.add_argument("--least-gain", type=float, default=1.0, metavar="PERCENT", help="net saving below which it is not worth it (default: 1)")  # fmt: skip
    p.add_argument(
        "--layers", type=int, default=8, metavar="N", help="MoE layers to look at, evenly spread (default: 8)"
    )
    p.add_argument("--batches", type=int, metavar="N", help="batches that a scenario's traffic is recorded for (default: up to 360, as about half a minute allows)")  # fmt: skip
    p.add_argument("--shuffle", action="store_true", help="put whole sequences into random order first: traffic without drift")  # fmt: skip
    p.add_argument("--experts", type=int, metavar="E", help="routed experts of a trace that does not say (default: the largest id + 1)")  # fmt: skip
    p.add_argument(
        "--policy", metavar="NAME", help="the scenario's policy whose gate to use (default: the first that has one)"
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of the bootstrap, of decode's mixing, of --shuffle (default: 0)"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded("python -m sim.advise", lambda: _main(args), "interrupted")


def _main(args: argparse.Namespace) -> int:
    _check(args)
    from sim.advice import Setup, report
    from sim.advice.batches import cut, fitting_tokens
    from sim.advice.options import check_redundant, fitting_redundant
    from sim.advice.placement import judge
    from sim.advice.verdict import verdict
    from sim.yamlfile import ScenarioError

    try:
        given = _inputs(args)
    except ScenarioError as error:  # one line for each problem
        raise ValueError(str(error)) from None
    sections, phases, assumed = [], [], []
    for phase, one in given.items():
        trace, ep_size, experts = one.trace, one.ep_size, one.trace.n_routed_experts
        redundant = fitting_redundant(experts, ep_size) if args.redundant is None else _numbers(args.redundant)
        check_redundant(redundant, experts, ep_size)
        setup = Setup(
            one.model, one.cluster, one.cost, ep_size, None if args.other_ms is None else args.other_ms / 1e3, args.solver_s, not args.background, args.context,
            args.interval, args.least_gain / 100, args.seed, one.mode, one.cache_tokens, one.simulated,
        )  # fmt: skip
        if args.tokens_per_rank and ep_size * args.tokens_per_rank > trace.n_tokens:
            raise ValueError(
                f"--tokens-per-rank {args.tokens_per_rank}: a batch of {ep_size} ranks x {args.tokens_per_rank:,} tokens = "
                f"{ep_size * args.tokens_per_rank:,} tokens; the traffic has {trace.n_tokens:,}"
            )
        tokens = args.tokens_per_rank or one.tokens_per_rank or fitting_tokens(trace.n_tokens, ep_size, phase)
        batches = cut(
            trace, ep_size=ep_size, tokens_per_rank=tokens, phase=phase, layers=args.layers, shuffle=args.shuffle,
            seed=args.seed,
        )  # fmt: skip
        found = judge(setup, batches, phase, redundant)
        answer = verdict(setup, batches, found)
        sections.append(report.section(setup, batches, phase, found, answer))
        phases.append(report.as_data(batches, phase, found, answer))
        assumed += report.assumptions(setup, one.notes)
    assumed = list(dict.fromkeys(assumed))
    if args.json:
        data = {
            "question": "placement",
            "traffic": args.traffic,
            "tokens": max(one.trace.n_tokens for one in given.values()),
            "phases": phases,
        }
        print(json.dumps(data | {"assumptions": assumed}, indent=1))
    else:
        print("\n\n".join([*sections, "assumed:\n" + "\n".join(f"  {line}" for line in assumed)]))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (("ep_size", 1), ("tokens_per_rank", 1), ("interval", 1), ("context", 1), ("layers", 1), ("batches", 1), ("experts", 1), ("seed", 0)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least} [got {value}]")
    for name in ("other_ms", "solver_s", "least_gain"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name.replace('_', '-')} must be a number of at least 0 [got {value}]")


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--redundant must be numbers separated by commas [got {text[:40]!r}]") from None


def _inputs(args: argparse.Namespace) -> dict[Any, Any]:
    """Return what each phase is asked of."""
    from sim.advice.inputs import of_trace

    phases = None if args.phase is None else (args.phase,)
    if os.path.splitext(args.traffic)[1].lower() in (".yaml", ".yml"):
        if args.experts is not None:
            raise ValueError("--experts is for traces: a scenario has its own")
        from sim.advice.simulated import of_scenario

        return dict(of_scenario(
            args.traffic, SCENARIOS, phases=phases, policy=args.policy, model=args.model, cluster=args.cluster, ep_size=args.ep_size,
            tokens_per_rank=args.tokens_per_rank, layers=args.layers, batches=args.batches,
        ))  # fmt: skip
    if args.policy is not None:
        raise ValueError("--policy is for scenarios: a trace has its choices made")
    if args.batches is not None:
        raise ValueError("--batches is for scenarios: a trace has as many as it has")
    found = of_trace(
        args.traffic, SCENARIOS, experts=args.experts, model=args.model, cluster=args.cluster, ep_size=args.ep_size
    )
    return dict.fromkeys(phases or ("decode", "prefill"), found)


if __name__ == "__main__":
    sys.exit(main())
