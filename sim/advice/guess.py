"""What a trace alone does not say: which model, which cluster, which number formats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sim.cluster import Cluster
from sim.cost.port import Port
from sim.hardware import Device
from sim.model import Model
from sim.settings import Cost
from sim.yamlfile import read, validate

M = TypeVar("M", bound=BaseModel)


def load(kind: type[M], given: str, folder: Path, option: str) -> M:
    """Return the shipped file called ``given`` in ``folder``, or the file at that path.

    Raises ValueError naming ``option`` and the shipped names.
    """
    path = folder / f"{given}.yaml"
    shipped = path.is_file() and Path(given).name == given
    if not shipped:
        path = Path(given)
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
            raise ValueError(f"{option} must be a file, or one of {known or 'none here'} [got {given!r}]")
    return validate(kind, read(path, root=folder.parent if shipped else None))


def model_of(n_routed_experts: int, num_experts_per_tok: int, n_layers: int, folder: Path) -> tuple[Model, str]:
    """Return the shipped model that these sizes suggest, and a sentence that says so.

    The first, by name, with as many experts and as many per token; else the nearest with experts, its numbers changed to
    those of the trace. Raises ValueError if there are none.
    """
    best: tuple[float, Model] | None = None
    for path in sorted(folder.glob("*.yaml")):
        model = validate(Model, read(path, root=folder.parent))
        if not model.is_moe:
            continue
        far = abs(math.log(model.n_routed_experts / n_routed_experts))
        far += 2 * abs(math.log(model.num_experts_per_tok / num_experts_per_tok))
        if far == 0 and model.n_moe_layers >= n_layers:
            return (
                model,
                f"model {model.name}, guessed from {n_routed_experts} experts, {num_experts_per_tok} per token",
            )
        if best is None or far < best[0]:
            best = far, model
    if best is None:
        raise ValueError("no shipped model to take sizes from: give --model FILE")
    near = best[1]
    changed = {
        "n_routed_experts": n_routed_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "num_hidden_layers": n_layers + near.num_hidden_layers - near.n_moe_layers,
        "n_group": 1,
        "topk_group": 1,
        "published": None,
        "num_nextn_predict_layers": 0,
    }
    try:
        model = Model.model_validate(near.model_dump() | changed)
    except ValidationError:
        raise ValueError(
            f"no shipped model has {n_routed_experts} experts, {num_experts_per_tok} per token: give --model FILE"
        ) from None
    return model, (
        f"model: widths of {near.name} with {n_routed_experts} experts, {num_experts_per_tok} per token and {n_layers} MoE "
        "layers, guessed: no shipped model has these numbers"
    )


def cost_of(device: Device) -> Cost:
    """Return the default cost laws in the number formats that ``device`` has: fp8 with bf16 combine, or bf16."""
    if device.peak_flops_per_s.fp8 is None:
        return Cost(communication=Port(), gemm_dtype="bf16", dispatch_dtype="bf16")
    return Cost()


def ep_size_of(n_routed_experts: int, cluster: Cluster) -> int:
    """Return the most ranks, up to the 8 of a usual node, that one node has and that share the experts evenly."""
    most = min(8, cluster.topology.domain(cluster), cluster.n_devices)
    return max(size for size in range(1, most + 1) if n_routed_experts % size == 0)
