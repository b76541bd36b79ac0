"""What a scenario assumes: numbers of its hardware, cost laws and traffic that nobody has measured for this very run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from sim.checks import problems
from sim.scenario import Scenario
from sim.sensitive.labels import label_of
from sim.sensitive.places import Path, at, is_transferred, limits, numbers, replaced, transferred

SPREAD = 0.2
_COSTS = ("cluster", "cost", "stragglers")  # what routing does not depend on, but for
_SHAPES = {"nodes", "devices_per_node", "nodes_per_supernode"}
# Counts and data-sheet facts, which are known, and what is chosen, not assumed.
_FACTS = {"nodes", "devices_per_node", "devices_per_nic", "memory_bytes", "n_sm", "tile_rows"}


@dataclass(frozen=True)
class Constant:
    """One assumption: numbers of the scenario that are off together.

    keys: their ``--set`` keys. values: what is stated. low, high: factors on all of them; of an ``absolute`` one, whose only
    value is 0, the values themselves.
    """

    label: str
    keys: tuple[str, ...]
    values: tuple[float, ...]
    low: float
    high: float
    absolute: bool = False

    @property
    def stated(self) -> float:
        """The factor, or value, that leaves all as it is."""
        return self.values[0] if self.absolute else 1.0

    @property
    def reroutes(self) -> bool:
        """Whether gates may choose otherwise with another value."""
        return any(_top(key) not in _COSTS or key.rsplit(".", 1)[-1] in _SHAPES for key in self.keys)

    @property
    def whole(self) -> bool:
        """Whether it is of whole numbers only."""
        return all(isinstance(value, int) for value in self.values)

    def at(self, x: float) -> tuple[float, ...]:
        """The numbers at factor (or value) ``x``; whole ones stay whole."""
        exact = [x if self.absolute else value * x for value in self.values]
        return tuple(
            round(new) if isinstance(value, int) else new for value, new in zip(self.values, exact, strict=True)
        )


def _top(key: str) -> str:
    parts = key.split(".")
    return parts[2] if parts[0] == "policies" and len(parts) > 2 else parts[0]


def applied(scenario: Scenario, constants: Sequence[Constant], xs: Sequence[float]) -> Scenario:
    """Return ``scenario`` with every constant at its ``xs`` [constants]. A kernel's constant that the device does not state is
    changed after what it is transferred by. Raises pydantic.ValidationError."""
    direct: dict[Path, float] = {}
    late: dict[Path, dict[str, float]] = {}
    for constant, x in zip(constants, xs, strict=True):
        if x == constant.stated:
            continue
        for key, new in zip(constant.keys, constant.at(x), strict=True):
            path = tuple(key.split("."))
            if is_transferred(scenario, path):
                late.setdefault(path[:-1], {})[path[-1]] = x
            else:
                direct[path] = new
    changed = replaced(scenario, direct) if direct else scenario
    blocks = {}
    for path, factors in late.items():
        block = transferred(at(changed, path[:-2]), path[-1])
        blocks[path] = replaced(block, {(name,): getattr(block, name) * x for name, x in factors.items()})
    return replaced(changed, blocks) if blocks else changed


def allowed(scenario: Scenario, constant: Constant, x: float) -> bool:
    """Whether the scenario is a valid one with ``constant`` at ``x``."""
    try:
        return next(problems(applied(scenario, [constant], [x])), None) is None
    except ValidationError:
        return False


def places_of(scenario: Scenario, key: str) -> list[tuple[Path, float]]:
    """The numbers that ``key`` names: itself, of every item for ``*``, of every gate for ``gating.``."""
    parts = tuple(key.split("."))
    if parts[0] == "gating":
        parts = ("policies", "*", *parts[1:])
    paths: list[Path] = [()]
    for part in parts:
        wider: list[Path] = []
        for path in paths:
            items = _value(scenario, path)
            if not isinstance(items, tuple) or part.isdecimal():
                wider.append((*path, part))
            else:  # balance.pull_back: of every rule
                rest = () if part == "*" else (part,)
                wider += [(*path, str(i), *rest) for i in range(len(items))]
        paths = wider
    found = []
    for path in paths:
        value = _value(scenario, path)
        if value is None and is_transferred(scenario, path):
            block = transferred(at(scenario, path[:-3]), path[-2])
            value = getattr(block, path[-1], None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append((path, value))
    return found


def _value(scenario: Scenario, path: Path) -> object:
    """What is at ``path``; None if nothing."""
    try:
        return at(scenario, path)
    except KeyError:
        return None


def assumptions(scenario: Scenario, spread: float = SPREAD) -> list[Constant]:
    """Return what is assumed where the user names nothing: rates, latencies and constants of the cluster, the kernels and the
    cost laws, stragglers, host overheads, the traffic's skew, and strengths of losses and of assumed router dynamics.

    Found by walking the resolved scenario, not by a list of keys. What has no effect on a metric is for the caller to find.
    """
    found: list[Constant] = []
    for keys in _groups(scenario):
        numbers_of = {key: places[0][1] for key in keys if (places := places_of(scenario, key)) and places[0][1] != 0}
        if numbers_of:
            first = next(iter(numbers_of))
            name = first.replace("serving.units.0.", "serving.units.*.") if len(numbers_of) > 1 else first
            constant = Constant(
                label_of(name, scenario), tuple(numbers_of), tuple(numbers_of.values()), 1 - spread, 1 + spread
            )
            low, high = within_limits(scenario, constant, constant.low, constant.high)
            found.append(replace(constant, low=low, high=high))
    return [constant for constant in found if constant.low < constant.high]


def within_limits(scenario: Scenario, constant: Constant, low: float, high: float) -> tuple[float, float]:
    """Return the factors cut to what the fields take (no slowdown is below 1, no share above it), and to 1 where the scenario
    refuses the end all the same."""
    for key, value in zip(constant.keys, constant.values, strict=True):
        path = tuple(key.split("."))
        if value > 0:
            if is_transferred(scenario, path):
                least, most = limits(transferred(at(scenario, path[:-3]), path[-2]), path[-1:])
            else:
                least, most = limits(scenario, path)
            low, high = max(low, least / value), min(high, most / value)
    low, high = (x if allowed(scenario, constant, x) else 1.0 for x in (low, high))
    return min(1.0, low), max(1.0, high)


def _groups(scenario: Scenario) -> Iterator[list[str]]:
    """Keys that are off together, in the order of the scenario."""
    clusters = [(f"policies.{i}.cluster", p.cluster) for i, p in enumerate(scenario.policies) if p.cluster is not None]
    if len(clusters) < len(scenario.policies):
        clusters.insert(0, ("cluster", scenario.cluster))
    for place, cluster in clusters:
        device = f"{place}.device"
        peak = cluster.device.peak_flops_per_s
        yield [f"{device}.peak_flops_per_s.{name}" for name in type(peak).model_fields if getattr(peak, name)]
        yield [f"{device}.memory_bandwidth_bytes_per_s"]
        for name in ("power_w", "price_per_hour"):
            yield [f"{device}.{name}"]
        for kernel in type(cluster.device.kernels).model_fields:
            block = getattr(cluster.device.kernels, kernel) or transferred(cluster.device, kernel)
            for path, _ in numbers(block):
                if path[-1] not in _FACTS:
                    yield [f"{device}.kernels.{kernel}.{path[-1]}"]
        for link in ("intra_node", "inter_node"):
            if getattr(cluster, link) is not None:
                yield [f"{place}.{link}.{name}" for name in ("bandwidth_bytes_per_s", "achievable_bytes_per_s")]
                yield [f"{place}.{link}.{name}" for name in ("latency_s", "cross_leaf_latency_s")]
        for path, _ in numbers(cluster.topology):
            if path[-1] not in _FACTS:
                yield [".".join((place, "topology", *path))]
    for path, _ in numbers(scenario.cost):
        yield [".".join(("cost", *path))]
    for i, _ in enumerate(scenario.stragglers):
        yield [f"stragglers.{i}.slowdown"]
    if scenario.serving is not None:
        yield [".".join(("serving", *path)) for path, _ in numbers(scenario.serving) if path[-1].endswith("overhead_s")]
    yield [".".join(("traffic", *path)) for path, _ in numbers(scenario.traffic) if path[-1] == "popularity_sd"]
    yield [
        f"policies.{i}.balance.{j}.pull_back"
        for i, policy in enumerate(scenario.policies)
        for j, rule in enumerate(policy.balance)
        if hasattr(rule, "pull_back")
    ]
    for path, value in numbers(scenario.router_dynamics):
        if isinstance(value, float):
            yield [".".join(("router_dynamics", *path))]
