"""Keys of constants in words."""

from __future__ import annotations

from sim.scenario import Scenario

_WORDS = {
    "peak_flops_per_s": "tensor peak",
    "memory_bandwidth_bytes_per_s": "HBM bandwidth",
    "power_w": "board power",
    "price_per_hour": "price of a device hour",
    "overhead_s": "launch",
    "tile_overhead_s": "start of a tile",
    "step_s": "time per inner element",
    "flops_per_s": "FLOP/s",
    "wgrad_flops_per_s": "FLOP/s of weight gradients",
    "bandwidth_bytes_per_s": "bandwidth",
    "pair_bytes_per_s": "rate of moving pairs",
    "token_bytes_per_s": "rate of walking tokens",
    "quantise_bytes_per_s": "rate of quantising",
    "position_s": "time per position",
    "unit_s": "time per work unit",
    "padding_tokens": "padding",
    "norm": "overlap of computing and reading (norm)",
    "forward": "share of peak, forward",
    "backward": "share of peak, backward",
    "latency_s": "latency",
    "oversubscription": "oversubscription",
    "num_sms": "SMs that communicate",
    "dispatch_contention": "slowdown of dispatch beside GEMMs",
    "combine_contention": "slowdown of combine beside GEMMs",
    "slowdown": "slowdown",
    "host_overhead_s": "scheduler's own time",
    "popularity_sd": "popularity spread (skew)",
    "pull_back": "pull-back of auxiliary losses",
}
_LINKS = {
    "nvlink": "NVLink",
    "xgmi": "xGMI",
    "pcie": "PCIe",
    "infiniband": "NIC",
    "roce": "NIC",
    "ub": "UB",
    "ici": "ICI",
}


def label_of(key: str, scenario: Scenario) -> str:
    """Return what people call the constant at ``key``, the key itself where there is no word for it."""
    parts = key.split(".")
    of = ""
    if parts[0] == "policies" and len(parts) > 2 and parts[1].isdecimal() and parts[2] == "cluster":
        policy = scenario.policies[int(parts[1])]
        of, parts = f"{policy.name}: ", parts[2:]
        cluster = policy.cluster or scenario.cluster
    else:
        cluster = scenario.cluster
    word = _WORDS.get(parts[-1]) or _WORDS.get(parts[-2] if len(parts) > 1 else "")
    if word is None:
        return key
    if parts[0] == "cluster" and "kernels" in parts:
        return f"{of}{_kernel(parts[-2])}: {word}"
    if parts[0] == "cluster" and parts[1] in ("intra_node", "inter_node"):
        link = cluster.intra_node if parts[1] == "intra_node" else cluster.inter_node
        name = _LINKS.get(link.kind, link.kind) if link is not None else parts[1]
        return f"{of}{name} {word}"
    if parts[0] == "cost" and len(parts) > 2:
        return word if parts[1] == "communication" else f"{parts[1]} law: {word}"
    if parts[:2] == ["serving", "units"] and scenario.serving is not None and parts[2].isdecimal():
        return f"{scenario.serving.units[int(parts[2])].name}: {word}"
    if parts[0] == "stragglers":
        return f"{word} of straggler {parts[1]}"
    if parts[0] in ("cluster", "traffic", "policies", "serving"):
        return f"{of}{word}"
    return key


def _kernel(name: str) -> str:
    name = name.replace("gemm", "GEMM").replace("_", " ").replace("mla", "MLA").replace("gqa", "GQA")
    return f"dense {name}" if name.startswith("GEMM") else name
