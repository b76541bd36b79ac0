"""Tidy tables of one serving run; ``head`` (policy, replica) leads every row."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from sim.deployment import Serving
from sim.engine.serving.fleet import Sizes
from sim.engine.serving.world import Finished
from sim.metrics.serving import binned, meets, spread, tpot_s, usd_per_million, weighted_spread, within
from sim.tokens import F64, I64, Bool
from sim.units import PS_PER_S, to_ps

Table = dict[str, list[Any]]
PARTS = ("attention", "experts", "communication", "other")
_BINS = 100  # of the timeline, over the time in which requests arrive


class Tables:
    """What a finished run comes down to. The means leave out requests and time before ``serving.warmup_s``; rates are over
    the time from then on until ``serving.duration_s``, or the last request's end if that comes first."""

    def __init__(
        self,
        served: Finished,
        serving: Serving,
        topics: tuple[str, ...],
        price_per_hour: float | None,
        head: dict[str, Any],
    ) -> None:
        self.served, self.serving, self.topics, self.price, self.head = served, serving, topics, price_per_hour, head
        self.log, self.imbalance = served.log.columns(), served.log.imbalances()
        self.begin_ps = int(to_ps(serving.warmup_s))
        self.until_ps = max(self.begin_ps, min(int(to_ps(serving.duration_s)), served.end_ps))
        self.window_s = (self.until_ps - self.begin_ps) / PS_PER_S or math.nan  # all is over before it begins
        self.unit_of_group = served.fleet.unit[np.unique(served.fleet.group, return_index=True)[1]]
        self.row_unit = self.unit_of_group[self.log["group"]] if len(self.unit_of_group) else self.log["group"]
        self.rests = served.log.rests()
        self.rest_unit = self.unit_of_group[self.rests["group"]] if len(self.unit_of_group) else self.rests["group"]
        self.inside = within(self.log["start_ps"], self.log["end_ps"], self.begin_ps, self.until_ps) / PS_PER_S

    def all(self) -> dict[str, Table]:
        """Return the tables by name."""
        requests = self.requests()
        return {
            "requests": requests,
            "service": _columns([self.head | self._service(requests)]),
            "units": _columns(self.head | self._unit(u) for u in range(len(self.sizes))),
            "timeline": _columns(self.head | row for u in range(len(self.sizes)) for row in self._timeline(u)),
            "rebalances": _columns(self.head | row for row in self._rebalances()),
            "faults": _columns(self.head | row for row in self.served.faults),
        }

    @property
    def sizes(self) -> tuple[Sizes, ...]:
        return tuple(self.served.fleet.sizes)

    def requests(self) -> Table:
        """One row per request, in the order of arrival; of a refused one the times are NaN."""
        found, fleet = self.served.requests, self.served.fleet

        def column(name: str) -> I64:
            return np.array([getattr(request, name) for request in found], dtype=np.int64)

        arrival, first, end, place, output = map(column, ("arrival_ps", "first_ps", "end_ps", "place", "output_tokens"))
        refused = column("refused").astype(bool)
        first_rank = np.searchsorted(fleet.group, np.arange(fleet.group.max() + 1))
        group = fleet.group[place]
        index = group - np.searchsorted(self.unit_of_group, self.unit_of_group[group])

        def seconds(ps: I64) -> F64:
            return np.where(refused, np.nan, ps / PS_PER_S)

        to_first, e2e = seconds(first - arrival), seconds(end - arrival)
        names = [size.unit.name for size in self.sizes]
        columns: dict[str, Any] = {
            "request": np.arange(len(found)),
            "arrival_s": arrival / PS_PER_S,
            "unit": [
                names[u] if p >= 0 else "" for u, p in zip(fleet.unit[place].tolist(), place.tolist(), strict=True)
            ],
            "group": np.where(place >= 0, index, -1),
            "rank": np.where(place >= 0, place - first_rank[group], -1),
            "queued_s": seconds(column("queued_ps")),
            # Where prompts come with their cache, nobody knows when they were asked.
            "ttft_s": np.full(len(found), np.nan) if fleet.decode_alone else to_first,
            "tpot_s": tpot_s(to_first, e2e, output),
            "e2e_s": e2e,
            "input_tokens": column("input_tokens"),
            "output_tokens": output,
            "cached_tokens": np.maximum(column("cached_tokens"), 0),
            "topic": [self.topics[request.topic] for request in found],
            "preemptions": column("preemptions"),
            "retries": column("retries"),
            "refused": refused,
        }
        plain = {
            name: values.tolist() if isinstance(values, np.ndarray) else values for name, values in columns.items()
        }
        return {name: [value] * len(found) for name, value in self.head.items()} | plain

    def _ended_well(self, requests: Table, good: Bool) -> int:
        """Requests ``good`` [n] that ended within the window, whenever they arrived: more than units can serve end later,
        and do not count."""
        end = np.array(requests["arrival_s"]) + np.array(requests["e2e_s"])
        inside = (end >= self.begin_ps / PS_PER_S) & (end <= self.until_ps / PS_PER_S)
        return int((good & inside).sum())

    def _service(self, requests: Table) -> dict[str, float]:
        serving, served = self.serving, self.served
        refused = np.array(requests["refused"], dtype=bool)
        counted = np.array(requests["arrival_s"]) >= serving.warmup_s
        done = counted & ~refused
        every = [np.array(requests[f"{name}_s"]) for name in ("ttft", "tpot", "e2e", "queued")]
        good = (
            meets(every[0], every[1], every[2], (serving.slo.ttft_s, serving.slo.tpot_s, serving.slo.e2e_s)) & ~refused
        )
        ttft, per_token, e2e, queued = (values[done] for values in every)
        gaps, weights = served.log.token_gaps()
        row: dict[str, float] = {}
        for name, values in (
            ("ttft", spread(ttft[~np.isnan(ttft)])),
            ("tpot", spread(per_token[~np.isnan(per_token)])),
            ("itl", weighted_spread(gaps / PS_PER_S, weights.astype(np.float64))),
            ("e2e", spread(e2e)),
            ("queued", spread(queued)),
        ):
            row |= {f"{name}_{key}_s": value for key, value in values.items()}
        row["user_tokens_per_s"] = 1.0 / row["tpot_mean_s"] if row["tpot_mean_s"] else math.nan
        row |= {
            "goodput_share": float((good & counted).sum() / counted.sum()) if counted.any() else math.nan,
            "goodput_per_s": self._ended_well(requests, good) / self.window_s if counted.any() else math.nan,
        }
        row |= {"requests": int(counted.sum()), "refused": int((refused & counted).sum())}
        for name in ("preemptions", "retries"):
            row[name] = int(np.array(requests[name])[counted].sum())
        for stage in served.stages[:3]:
            row[f"{stage.name}_mean"] = stage.mean_between(self.begin_ps, self.until_ps)
        everything = np.ones(len(self.inside), dtype=bool)
        devices = sum(size.devices * size.unit.count for size in self.sizes)
        return row | self._work(everything, devices, range(len(self.sizes)))

    def _unit(self, u: int) -> dict[str, Any]:
        unit = self.sizes[u].unit
        devices = self.sizes[u].devices * unit.count
        head = {
            "unit": unit.name,
            "role": unit.role,
            "devices": devices,
            "kv_cache_tokens": self.sizes[u].capacity_tokens,
        }
        return head | self._work(self.row_unit == u, devices, [u])

    def _work(self, rows: Bool, devices: int, units: Iterable[int]) -> dict[str, float]:
        """Rates, occupancy and time of the iterations ``rows``, over the window."""
        log, inside = self.log, np.where(rows, self.inside, 0.0)
        ended = rows & (log["end_ps"] > self.begin_ps) & (log["end_ps"] <= self.until_ps)
        busy, n = inside.sum(), int(ended.sum())
        groups = sum(self.sizes[u].unit.count for u in units)
        row: dict[str, float] = {"iterations": n, "utilisation": float(busy / (groups * self.window_s))}
        device_s = devices * self.window_s
        for name in ("prompt", "cached", "output"):
            row[f"{name}_tokens_per_s_per_gpu"] = float(log[f"{name}_tokens"][ended].sum() / device_s)
        read = row["prompt_tokens_per_s_per_gpu"] + row["cached_tokens_per_s_per_gpu"]
        if self.served.fleet.decode_alone:  # prompts were computed, and paid for, elsewhere
            read = row["prompt_tokens_per_s_per_gpu"] = row["cached_tokens_per_s_per_gpu"] = math.nan
        row["input_tokens_per_s_per_gpu"] = read
        output = row["output_tokens_per_s_per_gpu"]
        for name, rate in (
            ("output", output),
            ("input", read),
            ("tokens", output + (0.0 if math.isnan(read) else read)),
        ):
            row[f"usd_per_million_{name}"] = usd_per_million(rate * 3600, 1.0, self.price)
        row["decoding_per_rank"] = (
            float((log["decoding"] / self.ranks_of_rows * inside).sum() / busy) if busy else math.nan
        )
        row |= self._cache(rows, units)
        balance = weighted_spread(self.imbalance[rows], inside[rows])
        row |= {"imbalance_mean": balance["mean"], "imbalance_p99": balance["p99"]}
        row["iteration_s"] = float((log["end_ps"] - log["start_ps"])[ended].mean() / PS_PER_S) if n else math.nan
        for part in PARTS:
            row[f"{part}_s"] = float(log[f"{part}_ps"][ended].mean() / PS_PER_S) if n else math.nan
        return row

    def _cache(self, rows: Bool, units: Iterable[int]) -> dict[str, float]:
        """Mean and highest share of the cache that requests hold, over the window, whether groups iterate or rest."""
        area, most = 0.0, 0.0
        for held, unit, chosen in (
            (self.log, self.row_unit, rows),
            (self.rests, self.rest_unit, np.isin(self.rest_unit, list(units))),
        ):
            inside = within(held["start_ps"], held["end_ps"], self.begin_ps, self.until_ps) / PS_PER_S * chosen
            capacity = np.array([size.capacity_blocks for size in self.sizes], dtype=np.float64)[unit]
            ranks = np.array([size.n_ranks for size in self.sizes], dtype=np.float64)[unit]
            area += float((held["used_blocks"] / (capacity * ranks) * inside).sum())
            most = max(most, float((held["fullest"] / capacity)[inside > 0].max(initial=0.0)))
        groups = sum(self.sizes[u].unit.count for u in units)
        return {"kv_mean": area / (groups * self.window_s), "kv_max": most}

    @property
    def ranks_of_rows(self) -> F64:
        return np.array([size.n_ranks for size in self.sizes], dtype=np.float64)[self.row_unit]

    def _timeline(self, u: int) -> Iterable[dict[str, Any]]:
        edges = np.linspace(0, to_ps(self.serving.duration_s), _BINS + 1).astype(np.int64)
        width_s = np.diff(edges) / PS_PER_S
        sums = {
            name: np.zeros(_BINS)
            for name in ("busy", "queue", "running", "decoding", "kv", "imbalance", "input", "output")
        }
        blocks = self.sizes[u].n_ranks * self.sizes[u].capacity_blocks
        for group in np.flatnonzero(self.unit_of_group == u).tolist():
            rows = self.log["group"] == group
            log = {name: values[rows] for name, values in self.log.items()}
            lasts = np.maximum(log["end_ps"] - log["start_ps"], 1) / PS_PER_S
            for name, rate in (
                ("busy", np.ones(len(lasts))),
                ("queue", log["waiting"]),
                ("running", log["running"]),
                ("decoding", log["decoding"]),
                ("kv", log["used_blocks"] / blocks),
                ("imbalance", self.imbalance[rows]),
                ("input", (log["prompt_tokens"] + log["cached_tokens"]) / lasts),
                ("output", log["output_tokens"] / lasts),
            ):
                sums[name] += binned(log["start_ps"], log["end_ps"], rate, edges) / PS_PER_S
            rest = {name: values[self.rests["group"] == group] for name, values in self.rests.items()}
            for name, rate in (("queue", rest["waiting"]), ("kv", rest["used_blocks"] / blocks)):
                sums[name] += binned(rest["start_ps"], rest["end_ps"], rate, edges) / PS_PER_S
        count = self.sizes[u].unit.count
        busy = np.where(sums["busy"] > 0, sums["busy"], np.nan)
        columns = {
            "time_s": edges[:-1] / PS_PER_S,
            "utilisation": sums["busy"] / width_s / count,
            "queue": sums["queue"] / width_s,
            "running": sums["running"] / width_s,
            "decoding": sums["decoding"] / width_s,
            "kv": sums["kv"] / width_s / count,
            "input_tokens_per_s": sums["input"] / width_s,
            "output_tokens_per_s": sums["output"] / width_s,
            "imbalance": sums["imbalance"] / busy,
        }
        name = self.sizes[u].unit.name
        for row in zip(*(values.tolist() for values in columns.values()), strict=True):
            yield {"unit": name} | dict(zip(columns, row, strict=True))

    def _rebalances(self) -> Iterable[dict[str, Any]]:
        """Every plan, with the mean imbalance since the last one took effect, and until the next one did."""
        names = [size.unit.name for size in self.sizes]
        for row in self.served.rebalances:
            u = names.index(row["unit"])
            times = [r["effective_s"] for r in self.served.rebalances if r["unit"] == row["unit"] and r["done"]]
            before = [t for t in times if t <= row["time_s"]]
            after = [t for t in times if t > row["effective_s"]] if row["done"] else []
            yield row | {
                "imbalance_before": self._imbalance(u, before[-1] if before else 0.0, row["time_s"]),
                "imbalance_after": self._imbalance(u, row["effective_s"], after[0] if after else math.inf)
                if row["done"]
                else math.nan,
            }

    def _imbalance(self, u: int, since_s: float, until_s: float) -> float:
        starts, ends = self.log["start_ps"] / PS_PER_S, self.log["end_ps"] / PS_PER_S
        rows = (self.row_unit == u) & (starts >= since_s) & (ends <= until_s)
        return float(np.average(self.imbalance[rows], weights=(ends - starts)[rows])) if rows.any() else math.nan


def _columns(rows: Iterable[dict[str, Any]]) -> Table:
    """Rows with equal keys, as columns."""
    table: Table = {}
    for row in rows:
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    return table
