"""Kernel times read from measured tables, those of the optional package aiconfigurator-core or of a folder like them.

Layout: <gpu>/<kernel>/<framework>/<version>/<table>_perf.parquet, latencies in ms. Between measured points times are
interpolated in the logarithm; a shape that was not measured is refused. What a table does not vary (SMs lent to
communication, weight gradients, requests of unequal length, chunks, windows) and its ends enter as the ratio of two
times of ``calibrated``, so that measured points stay exact. A kernel without a table at all is ``calibrated``'s.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from sim.cost import ComputeCost, Part, Pass
from sim.cost.attention import AttentionShape, Phase
from sim.cost.calibrated import Calibrated
from sim.cost.curves import Curves
from sim.cost.roofline import f64
from sim.hardware import Device, Dtype
from sim.tokens import F64

if TYPE_CHECKING:
    import pandas as pd

PACKAGE = "aiconfigurator_core"
TABLE_DTYPE: dict[Dtype, str] = {"bf16": "bfloat16", "fp8": "fp8_block", "fp4": "nvfp4"}
LAW = Calibrated()


class Table(ComputeCost):
    """Measured tables of one framework's kernels.

    framework: whose; of its versions the newest that holds a row counts, of its kernels the quickest. path: a folder of
    the package's layout instead of the package. gpu: the folder of a device; by default the longest made of words of
    the device's name (``NVIDIA H100 SXM``: h100_sxm). num_experts, num_experts_per_tok: which of a table's MoE shapes, where several have one
    hidden and expert width.

    Routed experts are the balanced row at the rank's own pairs and active experts, not a ``power_law`` row: those are
    one random draw each, whose loads are not recorded, while a rank's load is known here. Rows of SGLang and vLLM
    Triton kernels at EP 2-64 do not fall with the load: prefer trtllm.
    """

    kind: Literal["table"] = "table"
    framework: Literal["trtllm", "sglang", "vllm"] = "trtllm"
    path: str | None = None
    gpu: str | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None

    def root(self) -> Path:
        """Return the folder of tables; ValueError says what to install."""
        if self.path is not None:
            if not Path(self.path).is_dir():
                raise ValueError(f"table: {self.path} is not a folder of measured tables")
            return Path(self.path)
        found = find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                'table needs measured tables: pip install "gatesim[tables]", or give path: a folder laid out as '
                "<gpu>/<kernel>/<framework>/<version>/<table>_perf.parquet"
            )
        return Path(next(iter(found.submodule_search_locations))) / "systems" / "data"

    def folder(self, device: Device) -> Path:
        """Return the device's folder; ValueError lists those that exist."""
        root = self.root()
        known = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        name = self.gpu or device.name.lower().removeprefix("nvidia ").replace(" ", "_")
        if self.gpu is None:
            words = set(name.split("_"))
            name = max((entry for entry in known if words >= set(entry.split("_"))), key=len, default=name)
        if name not in known:
            raise ValueError(
                f"table: no tables of {name}; gpu must be one of {', '.join(known) or 'none: it is empty'}"
            )
        return root / name

    def provenance(self, device: Device, step_in: Dtype | None = None) -> str:
        folder, parts = self.folder(device), []
        for kernel, table, says in _TABLES:
            versions = _versions(folder, kernel, self.framework, table)
            source = f"{folder.name} {self.framework} {versions[0]}" if versions else "calibrated: no table"
            parts.append(f"{says} {source}")
        return "; ".join([*parts, "training attention and elementwise calibrated", LAW.provenance(device, step_in)])

    def grouped_gemm_s(
        self,
        device: Device,
        *,
        expert_tokens: npt.ArrayLike,
        ep_tokens: npt.ArrayLike,
        hidden_size: int,
        moe_intermediate_size: int,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        part: Part = "forward",
        products_only: bool = False,
    ) -> F64:
        device.peak(dtype)
        shape: dict[str, Any] = {"hidden_size": hidden_size, "moe_intermediate_size": moe_intermediate_size}
        shape |= {"dtype": dtype}
        tokens = f64(expert_tokens)
        full = {"expert_tokens": tokens, "ep_tokens": ep_tokens} | shape
        wanted = LAW.grouped_gemm_s(device, **full, sm_fraction=sm_fraction, part=part, products_only=products_only)
        table = _load(self.folder(device), "moe", self.framework, "moe_perf")
        if table is None:
            return wanted
        curves, topk, experts = _grouped_curves(
            self.folder(device), self.framework, hidden_size, moe_intermediate_size, dtype,
            self.num_experts, self.num_experts_per_tok,
        )  # fmt: skip

        def law(local: F64, pairs: F64) -> F64:
            even = _even(pairs, local, int(np.ceil(local.max(initial=1.0))))
            walked = pairs * experts / (local * topk)
            return LAW.grouped_gemm_s(device, expert_tokens=even, ep_tokens=walked, **shape)

        pairs, active = tokens.sum(axis=-1), np.count_nonzero(tokens, axis=-1)
        local = float(tokens.shape[-1])
        # A balanced rank leaves experts idle only where it has fewer pairs than experts.
        held = np.where(active >= np.minimum(local, np.floor(pairs)), local, np.maximum(active, 1))
        seconds = curves.at(held, np.maximum(pairs, 1e-9), law)
        # How the rank's own load differs from the even one of that row: uneven experts, tokens walked, SMs, pass.
        return np.where(pairs > 0, seconds * (wanted / law(held, np.maximum(pairs, 1e-9))), wanted)

    def gemm_s(
        self,
        device: Device,
        *,
        tokens: npt.ArrayLike,
        in_features: npt.ArrayLike,
        out_features: npt.ArrayLike,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        part: Part = "forward",
        quantise: bool = False,
    ) -> F64:
        m, k, n = np.broadcast_arrays(f64(tokens), f64(in_features), f64(out_features))
        wanted = LAW.gemm_s(
            device, tokens=m, in_features=k, out_features=n, dtype=dtype, sm_fraction=sm_fraction, part=part,
            quantise=quantise,
        )  # fmt: skip
        if _load(self.folder(device), "gemm", self.framework, "gemm_perf") is None:
            return wanted
        axes, logs = _gemm_grid(self.folder(device), self.framework, dtype)
        held = [np.clip(value, axis[0], axis[-1]) for value, axis in zip((n, k, m), axes, strict=True)]
        seconds = np.exp(_trilinear([np.log(axis) for axis in axes], logs, [np.log(value) for value in held]))
        # Rows of 8- and 4-bit formats include the quantisation of the input.
        measured = LAW.gemm_s(
            device, tokens=held[2], in_features=held[1], out_features=held[0], dtype=dtype, quantise=True
        )
        return np.where(wanted > 0, seconds * (wanted / measured), 0.0)

    def attention_core_s(
        self,
        device: Device,
        *,
        tokens: npt.ArrayLike,
        flops_per_token: npt.ArrayLike,
        dtype: Dtype,
        sm_fraction: npt.ArrayLike = 1.0,
        direction: Pass = "forward",
    ) -> F64:
        return LAW.attention_core_s(
            device, tokens=tokens, flops_per_token=flops_per_token, dtype=dtype, sm_fraction=sm_fraction,
            direction=direction,
        )  # fmt: skip

    def attention_s(
        self,
        device: Device,
        *,
        shape: AttentionShape,
        phase: Phase,
        query_tokens: npt.ArrayLike,
        kv_tokens: npt.ArrayLike,
        cache_bytes_per_element: float = 2.0,
        window: int | None = None,
        sm_fraction: npt.ArrayLike = 1.0,
    ) -> F64:
        q, kv = np.broadcast_arrays(f64(query_tokens), f64(kv_tokens))
        fixed: dict[str, Any] = {"shape": shape, "phase": phase, "cache_bytes_per_element": cache_bytes_per_element}
        wanted = LAW.attention_s(device, query_tokens=q, kv_tokens=kv, window=window, sm_fraction=sm_fraction, **fixed)
        if phase == "mixed":  # no table has such batches
            return wanted
        kernel, table = _ATTENTION[shape.family, phase]
        if _load(self.folder(device), kernel, self.framework, table) is None:
            return wanted
        curves = _attention_curves(
            self.folder(device), self.framework, shape, phase, "fp8" if cache_bytes_per_element <= 1 else "bfloat16"
        )

        def law(batch: F64, length: F64) -> F64:
            """Equal requests as one request: the law is a sum over them but for the longest."""
            even = np.ones((*batch.shape, int(np.ceil(batch.max(initial=1.0)))))
            even = even * (np.arange(even.shape[-1]) < batch[..., None])
            new = even * (length[..., None] if phase == "prefill" else 1.0)
            return LAW.attention_s(device, query_tokens=new, kv_tokens=even * length[..., None], **fixed)

        there = q > 0
        batch = there.sum(axis=-1).astype(np.float64)
        total = np.where(there, q if phase == "prefill" else kv, 0.0).sum(axis=-1)
        busy = batch > 0
        many, mean = np.where(busy, batch, 1.0), np.where(busy, total / np.maximum(batch, 1.0), 1.0)
        seconds = curves.at(many, mean, law)
        return np.where(busy, seconds * (wanted / law(many, mean)), 0.0)

    def elementwise_s(self, device: Device, *, bytes: npt.ArrayLike, kernels: npt.ArrayLike = 0) -> F64:
        return LAW.elementwise_s(device, bytes=bytes, kernels=kernels)


_ATTENTION: dict[tuple[str, str], tuple[str, str]] = {
    ("mla", "prefill"): ("mla", "context_mla_perf"),
    ("mla", "decode"): ("mla", "generation_mla_perf"),
    ("gqa", "prefill"): ("attention", "context_attention_perf"),
    ("gqa", "decode"): ("attention", "generation_attention_perf"),
}
_TABLES = (
    ("moe", "moe_perf", "grouped GEMM"),
    ("gemm", "gemm_perf", "dense GEMM"),
    *((kernel, table, f"{family} {phase}") for (family, phase), (kernel, table) in _ATTENTION.items()),
)


def version_order(version: str) -> tuple[tuple[int, ...], int, str]:
    """Sort key of ``1.3.0rc20`` and ``0.5.6.post2``: numbers as numbers, a release after its candidates."""
    base, candidate, rest = version.partition("rc")
    numbers = tuple(int(part) for part in base.split(".") if part.isdigit())
    return numbers, int(rest) if candidate and rest.isdigit() else 1_000_000, version


def _versions(folder: Path, kernel: str, framework: str, table: str) -> list[str]:
    """Return the versions that hold a table, newest first."""
    found = (folder / kernel / framework).glob(f"*/{table}.parquet")
    return sorted((file.parent.name for file in found), key=version_order, reverse=True)


@lru_cache(maxsize=32)
def _load(folder: Path, kernel: str, framework: str, table: str) -> pd.DataFrame | None:
    """Return all versions' rows with a column ``age`` (0 is the newest), or None where there is no table."""
    import pandas as pd  # half a second that other cost models do not need

    versions = _versions(folder, kernel, framework, table)
    if not versions:
        return None
    frames = []
    for age, version in enumerate(versions):
        frame = pd.read_parquet(folder / kernel / framework / version / f"{table}.parquet")
        if "latency" not in frame:
            raise ValueError(f"table: {kernel}/{framework}/{version}/{table}.parquet has no column latency")
        frames.append(frame[frame.latency > 0].assign(age=age))
    return pd.concat(frames, ignore_index=True)


def _newest(rows: pd.DataFrame) -> pd.DataFrame:
    newest: pd.DataFrame = rows[rows.age == rows.age.min()]
    return newest


@lru_cache(maxsize=64)
def _grouped_curves(
    folder: Path, framework: str, hidden: int, width: int, dtype: Dtype, n_experts: int | None, topk: int | None
) -> tuple[Curves, float, float]:
    """Return seconds over a rank's (experts, pairs), the shape's k and number of experts."""
    table = _load(folder, "moe", framework, "moe_perf")
    assert table is not None
    rows = table[
        (table.moe_dtype == TABLE_DTYPE[dtype]) & (table.moe_tp_size == 1) & (table.distribution == "balanced")
    ]
    if "kernel_source" in rows:
        rows = rows[~rows.kernel_source.str.contains("nongated|min_latency")]
    same = rows[(rows.hidden_size == hidden) & (rows.inter_size == width)]
    where = f"{folder.name} {framework}"
    if same.empty:
        known = sorted(set(zip(rows.hidden_size, rows.inter_size, strict=True)))
        shapes = ", ".join(f"{h} x {m}" for h, m in known)
        raise ValueError(f"table: no {dtype} experts of {hidden} x {width} in {where}; it has {shapes or 'none'}")
    if n_experts is not None:
        same = same[same.num_experts == n_experts]
    if topk is not None:
        same = same[same.topk == topk]
    left = sorted(set(zip(same.num_experts, same.topk, strict=True)))
    if len(left) != 1:
        all_of = rows[(rows.hidden_size == hidden) & (rows.inter_size == width)]
        choices = ", ".join(
            f"{e} with k = {k}" for e, k in sorted(set(zip(all_of.num_experts, all_of.topk, strict=True)))
        )
        raise ValueError(
            f"table: {where} has experts of {hidden} x {width} as {choices}: choose num_experts and num_experts_per_tok"
        )
    experts, k = map(float, left[0])
    same = _newest(same)
    local = experts / same.moe_ep_size.to_numpy(np.float64)
    pairs = same.num_tokens.to_numpy(np.float64) * k / same.moe_ep_size.to_numpy(np.float64)
    # A rank with less than one pair on average is idle on some machines and not on others.
    whole = pairs >= 1
    points = zip(local[whole], pairs[whole], same.latency.to_numpy()[whole] / 1e3, strict=True)
    return Curves.of(points), k, experts


@lru_cache(maxsize=16)
def _gemm_grid(folder: Path, framework: str, dtype: Dtype) -> tuple[list[F64], F64]:
    """Return the axes n, k, m and log seconds [n, k, m] of the largest full grid that the table holds."""
    table = _load(folder, "gemm", framework, "gemm_perf")
    assert table is not None
    rows = table[table.gemm_dtype == TABLE_DTYPE[dtype]]
    if rows.empty:
        known = ", ".join(sorted(table.gemm_dtype.unique()))
        raise ValueError(f"table: no {dtype} products in {folder.name} {framework}; it has {known}")
    points = _newest(rows).groupby(["n", "k", "m"], sort=True)[["latency"]].min().reset_index()
    axes = [np.unique(points[name].to_numpy(np.float64)) for name in ("n", "k", "m")]
    seconds = np.full(tuple(len(axis) for axis in axes), np.nan)
    places = [np.searchsorted(axis, points[name]) for axis, name in zip(axes, ("n", "k", "m"), strict=True)]
    seconds[tuple(places)] = points.latency.to_numpy(np.float64) / 1e3
    while np.isnan(seconds).any():
        # Drop the value of an axis that misses the largest share of its points.
        gaps = [np.isnan(seconds).mean(axis=tuple(other for other in range(3) if other != axis)) for axis in range(3)]
        axis = int(np.argmax([gap.max() for gap in gaps]))
        keep = np.arange(len(axes[axis])) != int(gaps[axis].argmax())
        axes[axis], seconds = axes[axis][keep], np.compress(keep, seconds, axis=axis)
    return axes, np.log(seconds)


def _trilinear(axes: list[F64], values: F64, at: list[F64]) -> F64:
    """Return ``values`` [a, b, c] at points within the axes, linear along each of them."""
    lows, weights = [], []
    for axis, point in zip(axes, at, strict=True):
        low = np.clip(np.searchsorted(axis, point, side="right") - 1, 0, max(len(axis) - 2, 0))
        high = np.minimum(low + 1, len(axis) - 1)
        gap = axis[high] - axis[low]
        lows.append((low, high))
        weights.append(np.divide(point - axis[low], gap, out=np.zeros(point.shape), where=gap > 0))
    total = np.zeros(at[0].shape)
    for corner in np.ndindex(2, 2, 2):
        share = np.ones(at[0].shape)
        for side, weight in zip(corner, weights, strict=True):
            share = share * (weight if side else 1 - weight)
        total = total + share * values[tuple(low[side] for low, side in zip(lows, corner, strict=True))]
    return total


@lru_cache(maxsize=64)
def _attention_curves(folder: Path, framework: str, shape: AttentionShape, phase: Phase, cache: str) -> Curves:
    """Return seconds over (requests, tokens of each): new ones in prefill, cached ones in decode."""
    kernel, name = _ATTENTION[shape.family, phase]
    table = _load(folder, kernel, framework, name)
    assert table is not None
    rows = table[table.kv_cache_dtype == cache]
    for column, wanted in (("attn_dtype", "bfloat16"), ("mla_dtype", "bfloat16"), ("window_size", 0)):
        if column in rows:
            rows = rows[rows[column] == wanted]
    same = rows[rows.num_heads == shape.num_heads]
    says = f"{shape.num_heads} heads"
    if shape.family == "gqa":
        same = same[(same.num_key_value_heads == shape.num_key_value_heads) & (same.head_dim == shape.qk_dim)]
        says += f", {shape.num_key_value_heads} key-value heads of {shape.qk_dim}"
        known = sorted(set(zip(rows.num_heads, rows.num_key_value_heads, rows.head_dim, strict=True)))
        choices = ", ".join(f"{h}/{g}/{d}" for h, g, d in known)
    else:
        choices = ", ".join(str(h) for h in sorted(set(rows.num_heads)))
        if (shape.v_dim, shape.qk_dim) not in ((128, 192), (512, 576)):
            raise ValueError(f"table: MLA rows are of DeepSeek's head sizes, not {shape.qk_dim} and {shape.v_dim}")
    if same.empty:
        raise ValueError(
            f"table: no {phase} attention of {says} with a {cache} cache in {folder.name} {framework}; it has "
            f"{choices or 'none'}"
        )
    same = _newest(same)
    length = same.isl if phase == "prefill" else same.isl + same.step
    if phase == "prefill":
        same, length = same[same.step == 0], length[same.step == 0]
    return Curves.of(zip(same.batch_size, length, same.latency.to_numpy(np.float64) / 1e3, strict=True))


def _even(pairs: F64, local: F64, width: int) -> F64:
    """Return expert tokens [..., width] of ``pairs`` spread over ``local`` experts, at least one token to each used."""
    used = np.maximum(np.minimum(local, np.floor(pairs)), 1.0)
    place = np.arange(width)
    return np.where(place < used[..., None], (pairs / used)[..., None], 0.0)
