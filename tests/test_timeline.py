"""Timelines: well-formed events, the engine's own times, arrows between the right slices, and a cap that says what it cut."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim import timeline
from sim.engine.recording import RecordedPipeline, RecordedService, RecordedStep
from sim.engine.serving import recorded as keeping
from sim.estimate import estimate
from sim.exchange import token_bytes
from sim.loading import load
from sim.results import Result
from sim.study import route, run
from sim.timeline import chrome_trace, left_out
from sim.timeline.events import at, lasts, members

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
STEP = ["replicas=2", "steps.count=2", "steps.timed=all", "steps.warmup.steps=0", "traffic.tokens_per_rank=64",
        "policies=[{name: top-k}, {name: 'limited \"é\"', select: group_limited}]"]  # fmt: skip
PIPELINE = [
    "steps.warmup.steps=0", "steps.pilot_ranks=2", "model.num_hidden_layers=6", "parallel.pp_size=2",
    "schedule.micro_batches=8", "traffic.tokens_per_rank=64", "traffic.sequence_length=8",
]  # fmt: skip
UNITS = (
    "serving={duration_s: 1, sampled_layers: 2, pool_tokens: 128, draws: 1, "
    "requests: {kind: poisson, rate_per_s: 60, input_tokens: 300, output_tokens: 20}, "
    "units: [{name: p, role: prefill, count: 2, parallel: {ep_size: 2}, kv_cache_tokens: 4096}, "
    "{name: d, role: decode, parallel: {ep_size: 4}, kv_cache_tokens: 8192}], "
    "faults: [{at_s: 0.5, until_s: 0.7, unit: d, rank: 1, kind: slow_device}]}"
)
SERVED = ["schedule={phase: forward}", "replicas=2", UNITS,
          "policies=[{name: a, placement: {kind: eplb, num_redundant_experts: 8}, rebalance: {interval_s: 0.2, threshold: 1.0}}]"]  # fmt: skip

# What an event of each phase has to have (Trace Event Format), besides ph and pid.
KEYS = {
    "X": {"tid", "ts", "dur", "name", "cat", "args"},
    "C": {"ts", "name", "args"},
    "M": {"name", "args"},
    "i": {"tid", "ts", "name", "cat", "s", "args"},
    "s": {"tid", "ts", "name", "cat", "id"},
    "t": {"tid", "ts", "name", "cat", "id"},
    "f": {"tid", "ts", "name", "cat", "id", "bp"},
}
META = {
    "process_name": "name",
    "process_sort_index": "sort_index",
    "thread_name": "name",
    "thread_sort_index": "sort_index",
}
Event = dict[str, Any]


def parsed(result: Result, most: int = timeline.MOST_EVENTS) -> list[Event]:
    data = json.loads(gzip.decompress(chrome_trace(result, most)), parse_constant=pytest.fail)
    assert data["displayTimeUnit"] == "ns" and data["otherData"]["scenario"] == result.scenario.name
    events: list[Event] = data["traceEvents"]
    return events


def check(events: Iterable[Event]) -> None:
    """Hold ``events`` to the format, and to how Perfetto reads it: unlike numbers everywhere, and no overlap on a thread
    whether it rounds times to nanoseconds or cuts them off."""
    processes, threads, arrows = set(), {}, defaultdict(list)
    slices: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        phase = event["ph"]
        assert set(event) == KEYS[phase] | {"ph", "pid"} | ({"tid"} if "tid" in event else set()), event
        assert event["pid"] > 0
        if phase == "M":
            assert list(event["args"]) == [META[event["name"]]]
            (processes.add(event["pid"]) if event["name"] == "process_name" else None)
            if event["name"] == "thread_name":
                assert event["tid"] not in threads
                threads[event["tid"]] = event["pid"]
            continue
        assert event["pid"] in processes and event["ts"] >= 0
        if phase == "C":
            assert event["args"] and all(isinstance(v, (int, float)) for v in event["args"].values())
            continue
        assert threads[event["tid"]] == event["pid"]
        if phase == "X":
            slices[event["tid"]].append(event)
        elif phase == "i":
            assert event["s"] == "p"
        else:
            arrows[event["id"]].append(event)
    assert not processes & set(threads)
    for found in slices.values():
        for read in (lambda us: int(us * 1000.0), lambda us: round(us * 1000.0)):
            ends = 0
            for event in sorted(found, key=lambda e: e["ts"]):
                assert read(event["ts"]) >= ends, event
                ends = read(event["ts"]) + read(event["dur"])
    for stops in arrows.values():
        assert [stop["ph"] for stop in stops] == ["s", *"t" * (len(stops) - 2), "f"] and len(stops) > 1
        assert len({(stop["name"], stop["cat"]) for stop in stops}) == 1
        assert stops == sorted(stops, key=lambda stop: stop["ts"])


def bound(events: list[Event]) -> list[list[Event]]:
    """Return the slices that each arrow joins: of its thread the last begun, which must not be over."""
    by_thread: dict[int, list[Event]] = defaultdict(list)
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        by_thread[event["tid"]].append(event)
    starts = {tid: np.array([e["ts"] for e in found]) for tid, found in by_thread.items()}
    arrows: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            found = by_thread[event["tid"]][int(np.searchsorted(starts[event["tid"]], event["ts"], side="right")) - 1]
            assert found["ts"] < event["ts"] < found["ts"] + found["dur"]
            arrows[event["id"]].append(found)
    return list(arrows.values())


def names(events: list[Event], kind: str = "process_name") -> dict[int, str]:
    key = "pid" if kind == "process_name" else "tid"
    return {e[key]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == kind}


def ns(ps: Any) -> Any:
    return np.asarray(ps) // 1000


@pytest.fixture(scope="module")
def step() -> Result:
    return run(SCENARIOS / "tiny.yaml", overrides=STEP, timeline=True)


@pytest.fixture(scope="module")
def pipelined() -> Result:
    return run(SCENARIOS / "v3_training.yaml", overrides=PIPELINE, timeline=True, force=True)


@pytest.fixture(scope="module")
def served() -> Result:
    return run(SCENARIOS / "tiny.yaml", overrides=SERVED, timeline=True)


@pytest.mark.parametrize("kind", ["step", "pipelined", "served"])
def test_events_keep_to_the_format(kind: str, request: pytest.FixtureRequest) -> None:
    result: Result = request.getfixturevalue(kind)
    events = parsed(result)
    check(events)
    counted = sum(int(timeline._view(recorded).counts.sum()) for recorded in result.recorded)
    assert len(events) == counted + timeline._ABOUT
    policies = [policy.name for policy in result.scenario.policies]
    owners = [name.split(": ")[0] for name in list(names(events).values())[1:]]
    assert list(dict.fromkeys(owners)) == policies and owners == sorted(owners, key=policies.index)
    order = [e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"]
    assert order == list(range(1, len(order) + 1))
    assert left_out(result) == ""


@pytest.mark.parametrize(
    "spoil",
    [
        lambda e: e.pop("dur"),
        lambda e: e.update(dur=e["dur"] + 0.002),
        lambda e: e.update(tid=e["pid"]),
        lambda e: e.update(ts=-1.0),
    ],
)
def test_the_check_finds_what_is_wrong(step: Result, spoil: Callable[[Event], Any]) -> None:
    events = parsed(step)
    pairs = pairwise(events)
    spoil(next(a for a, b in pairs if a["ph"] == b["ph"] == "X" and a["tid"] == b["tid"] and b["name"] == "dense_ffn"))
    with pytest.raises((AssertionError, KeyError)):
        check(events)


def test_nothing_is_recorded_unless_asked_for() -> None:
    result = run(SCENARIOS / "tiny.yaml", overrides=[*STEP, "replicas=1", "policies=[{name: a}]"])
    assert result.recorded == ()
    with pytest.raises(ValueError, match="nothing was recorded"):
        chrome_trace(result)


def test_a_step_shows_the_engines_times(step: Result) -> None:
    events, devices = parsed(step), step.devices
    threads, processes = names(events, "thread_name"), names(events)
    for recorded in step.recorded:
        assert isinstance(recorded, RecordedStep) and (recorded.step, recorded.replica) == (1, 0)
        mine = [e for e in events if e["ph"] == "X" and processes[e["pid"]].startswith(f"{recorded.policy}: node")]
        rows = devices[(devices.policy == recorded.policy) & (devices.replica == 0) & (devices.step == 1)]
        for device, row in enumerate(rows.itertuples()):
            compute = [e for e in mine if threads[e["tid"]] == f"device {device} compute"]
            here = [i for i, label in enumerate(recorded.labels) if label.stream == "compute"]
            assert [int(e["ts"] * 1000) for e in compute] == ns(recorded.start_ps[here, device]).tolist()
            assert [int((e["ts"] + e["dur"]) * 1000) for e in compute] == ns(recorded.end_ps[here, device]).tolist()
            for phase in ("attention", "experts", "shared_experts", "dense_ffn", "experts_wgrad"):
                spent = [e["dur"] * 1e-6 for e in compute if e["name"].split(" ")[0] == phase]
                assert sum(spent) == pytest.approx(getattr(row, f"{phase}_s"), abs=2e-9 * len(spent))
            assert processes[compute[0]["pid"]] == f"{recorded.policy}: node {device // recorded.devices_per_node}"
            counted = [e["args"]["tokens"] for e in compute if e["name"] == "experts"]
            assert sum(counted) == row.expert_tokens
    assert max(e["ts"] + e["dur"] for e in events if e["ph"] == "X" and e["pid"] > 1) == pytest.approx(
        max(r.makespan_ps for r in step.recorded) / 1e6, abs=0.002
    )


def test_a_step_shows_what_waits(step: Result) -> None:
    """The counter of waiting devices integrates to exposed communication and waiting; the slices before an exchange to
    what its peers were late."""
    events, devices = parsed(step), step.devices
    processes, threads = names(events), names(events, "thread_name")
    for recorded in step.recorded:
        assert isinstance(recorded, RecordedStep)
        rows = devices[(devices.policy == recorded.policy) & (devices.replica == 0) & (devices.step == 1)]
        for node in range(2):
            pid = next(p for p, name in processes.items() if name == f"{recorded.policy}: node {node}")
            points = [(e["ts"], e["args"]["waiting"]) for e in events if e["ph"] == "C" and e["pid"] == pid and e["name"] == "devices"]  # fmt: skip
            assert points == sorted(points)
            ends = [*(t for t, _ in points[1:]), recorded.makespan_ps / 1e6]
            area = sum(n * (end - start) for (start, n), end in zip(points, ends, strict=True))
            idle = rows.iloc[4 * node : 4 * node + 4][["exposed_communication_s", "waiting_s"]].to_numpy().sum()
            assert area == pytest.approx(idle * 1e6, abs=0.01 * len(points))
            loads = [e["args"] for e in events if e["pid"] == pid and e["name"] == "expert tokens/mean"]
            assert len(loads) == sum(label.phase == "experts" for label in recorded.labels)
            assert all(load["fullest device"] >= load["node"] > 0 for load in loads)
        late = (recorded.peer_start_ps - recorded.start_ps)[:, 0].sum() / 1e6
        first = {tid for tid, name in threads.items() if name == "device 0 communication"}
        pids = {p for p, name in processes.items() if name == f"{recorded.policy}: node 0"}
        waits = [
            e["dur"] for e in events if e["name"] == "waiting for peers" and e["tid"] in first and e["pid"] in pids
        ]
        assert sum(waits) == pytest.approx(late, abs=0.002 * len(recorded.labels))


def test_arrows_join_dispatch_experts_and_combine(step: Result) -> None:
    events = parsed(step)
    threads = names(events, "thread_name")
    arrows = bound(events)
    layers, micro, policies, devices = 3, 2, 2, 8
    assert len(arrows) == 2 * layers * micro * policies * devices
    for joined in arrows:
        assert [e["name"].split(" ")[0] for e in joined] == ["dispatch", "experts", "combine"]
        assert len({tuple(e["args"][k] for k in ("layer", "micro_batch", "direction")) for e in joined}) == 1
        assert len({threads[e["tid"]].rsplit(" ", 1)[0] for e in joined}) == len({e["pid"] for e in joined}) == 1


def test_tokens_and_bytes_are_those_of_the_exchange(step: Result) -> None:
    scenario = load(SCENARIOS / "tiny.yaml", STEP)
    counts = route(scenario, 1, estimate(scenario)).counts
    events = parsed(step)
    processes = names(events)
    for index, policy in enumerate(scenario.policies):
        exchanges = [e for layer in counts[0, index] for e in layer.exchanges[1]]
        copies = [e.sent(scenario.cost.mode) for e in exchanges]
        here = sum(copies)  # source x destination; what goes back is sent by the destination
        assert isinstance(here, np.ndarray) and (here.sum(axis=0) != here.sum(axis=1)).any()
        recorded = step.recorded[index]
        assert isinstance(recorded, RecordedStep)
        for phase, sent in (("dispatch", here), ("combine", here.T)):
            ops = [i for i, label in enumerate(recorded.labels) if label.phase == phase and not label.backward]
            assert recorded.tokens[ops].sum(axis=0).tolist() == sent.sum(axis=1).tolist()
            away = (sent - np.diag(sent.diagonal())).sum(axis=1)
            per_copy = recorded.sent_bytes[ops].sum() // away.sum()
            assert recorded.sent_bytes[ops].sum(axis=0).tolist() == (per_copy * away).tolist()
        for phase, dtype in (("dispatch", scenario.cost.dispatch_dtype), ("combine", scenario.cost.combine_dtype)):
            for name in (phase, f"{phase} backward"):
                args = [
                    e["args"] for e in events if e["name"] == name and processes[e["pid"]].startswith(policy.name + ":")
                ]
                assert sum(a["tokens"] for a in args) == sum(int(sent.sum()) for sent in copies)
                away = sum(int(sent.sum() - sent.trace()) for sent in copies)
                assert sum(a["bytes"] for a in args) == away * token_bytes(scenario.model_of(policy).hidden_size, dtype)


def test_bytes_do_not_depend_on_engine_or_processes(step: Result, pipelined: Result) -> None:
    other = run(SCENARIOS / "tiny.yaml", overrides=[*STEP, "schedule.engine=max_plus"], jobs=2, timeline=True)
    assert chrome_trace(other) == chrome_trace(step) == chrome_trace(step)
    plain = [*PIPELINE, "schedule.engine=max_plus"]
    assert chrome_trace(run(SCENARIOS / "v3_training.yaml", overrides=plain, timeline=True, force=True)) == chrome_trace(pipelined)  # fmt: skip


def test_policies_of_several_arenas_keep_their_order() -> None:
    policies = "policies=[{name: a, parallel: {ep_size: 4}}, {name: b}, {name: c, parallel: {ep_size: 4}}]"
    result = run(SCENARIOS / "tiny.yaml", overrides=[*STEP, "replicas=1", policies], timeline=True)
    assert [recorded.policy for recorded in result.recorded] == ["a", "b", "c"]
    events = parsed(result)
    check(events)
    assert list(names(events).values())[1:] == ["a: node 0", "b: node 0", "b: node 1", "c: node 0"]


def test_a_cap_leaves_out_nodes_then_layers_then_policies(step: Result) -> None:
    sizes = [timeline._view(recorded).counts for recorded in step.recorded]
    whole = timeline._ABOUT + sum(int(counts.sum()) for counts in sizes)
    one_node = timeline._ABOUT + sum(int(counts[0].sum()) for counts in sizes)
    two_layers = timeline._ABOUT + sum(int(counts[0, :2].sum()) for counts in sizes)
    nodes, rest = "timeline leaves out all but the first 1 of 2 nodes", ": more than viewers open"
    said = {
        whole: "",
        whole - 1: f"{nodes}{rest}",
        one_node - 1: f"{nodes} and all but the first 3 of 4 layers{rest}",
        10: f"{nodes} and all but the first 1 of 4 layers and the policies after 'top-k'{rest}",
    }
    for most, message in said.items():
        assert left_out(step, most) == message
        events = parsed(step, most)
        check(events)
        assert len(events) <= most or most == 10
        assert events[4]["args"].get("left out", "") == message
    events = parsed(step, two_layers)
    assert len(events) == two_layers
    assert {e["args"]["layer"] for e in events if e["ph"] == "X" and e["pid"] > 1} == {0, 1}
    assert len(bound(events)) == 2 * 2 * 2 * 4


def test_a_pipeline_shows_its_chunks(pipelined: Result) -> None:
    events, devices = parsed(pipelined), pipelined.devices
    processes, threads = names(events), names(events, "thread_name")
    for recorded in pipelined.recorded:
        assert isinstance(recorded, RecordedPipeline)
        for rank, program in enumerate(recorded.programs):
            pid = next(
                p for p, name in processes.items() if name.startswith(f"{recorded.policy}: pipeline rank {rank} (")
            )
            for group in range(2):
                mine = [
                    e for e in events if e["ph"] == "X" and e["pid"] == pid and threads[e["tid"]] == f"EP group {group}"
                ]
                assert len(mine) == len(program) + 1 and mine[-1]["name"] == "optimizer"
                assert [int(e["ts"] * 1000) for e in mine[:-1]] == ns(recorded.start_ps[rank][group]).tolist()
                row = devices[
                    (devices.policy == recorded.policy) & (devices.pp_rank == rank) & (devices.ep_group == group)
                ]
                spent = sum(e["dur"] for e in mine) * 1e-6
                busy = row[[f"{p}_s" for p in ("forward", "backward", "weight_gradients", "overlapped", "optimizer")]]
                assert spent == pytest.approx(busy.to_numpy().sum(), abs=2e-9 * len(mine))
                assert (spent + row.bubble_s).item() == pytest.approx(recorded.optimizer_ps[1] * 1e-12, abs=1e-7)
                kinds = {(e["cat"], e["name"].rstrip("0123456789")) for e in mine}
                assert {("forward", "F"), ("backward", "B")} <= kinds
                assert all(a[0] == "overlapped" for a in kinds if "+" in a[1])
                assert any("+" in e["name"] for e in mine)
            held = [e["args"]["micro-batches held"] for e in events if e["ph"] == "C" and e["pid"] == pid]
            assert max(held) > 1 and min(held) > 0


def test_arrows_follow_micro_batches_through_the_stages(pipelined: Result) -> None:
    events = parsed(pipelined)
    arrows = bound(events)
    assert len(arrows) == 2 * 8 * 2 * len(pipelined.recorded)
    kinds = {e["id"]: e["name"] for e in events if e["ph"] == "s"}
    for joined, kind in zip(arrows, kinds.values(), strict=True):
        side = "forward" if kind == "activations" else "backward"
        assert len({e["args"][f"{side}_micro_batch"] for e in joined}) == 1
        stages = [e["args"][f"{side}_stage"] for e in joined]
        assert stages == ([0, 1] if side == "forward" else [1, 0])


def test_a_pipeline_is_cut_by_group_and_rank(pipelined: Result) -> None:
    counts = timeline._view(pipelined.recorded[0]).counts
    most = timeline._ABOUT + len(pipelined.recorded) * int(counts[0].sum())
    assert left_out(pipelined, most) == "timeline leaves out all but the first 1 of 2 expert-parallel groups: more than viewers open"  # fmt: skip
    check(parsed(pipelined, most))
    assert "all but the first 1 of 2 pipeline ranks" in left_out(pipelined, most - 1)
    few = parsed(pipelined, most - 1)
    check(few)
    assert not [e for e in few if e["ph"] in "stf"]


def test_a_service_shows_its_iterations(served: Result) -> None:
    events, units = parsed(served), served.units
    (recorded,) = served.recorded
    assert isinstance(recorded, RecordedService) and recorded.replica == 0
    log = recorded.iterations
    slices = [e for e in events if e["ph"] == "X" and e["cat"] == "iteration"]
    assert len(slices) == len(log["group"])
    by_group = np.argsort(log["group"], kind="stable")
    assert [int(e["ts"] * 1000) for e in slices] == ns(log["start_ps"][by_group]).tolist()
    assert {e["name"] for e in slices} == {"prefill", "decode"}
    requests = served.requests[served.requests.replica == 0]
    computed = sum(e["args"]["prompt_tokens"] for e in slices)
    assert computed == int((requests.input_tokens - requests.cached_tokens).sum())
    assert sum(e["args"]["output_tokens"] for e in slices) == int(requests.output_tokens.sum())
    decodes = [e["args"] for e in slices if e["name"] == "decode"]
    assert all(300 * a["decoding"] <= a["context"] <= 320 * a["decoding"] for a in decodes)
    assert len(decodes) >= units[(units.unit == "d") & (units.replica == 0)].iterations.item()
    pids = {p: name.split(" (")[0] for p, name in names(events).items()}
    assert list(pids.values())[1:] == ["a: p 0", "a: p 1", "a: d 0"]


def test_a_service_counts_and_marks(served: Result) -> None:
    events = parsed(served)
    (recorded,) = served.recorded
    assert isinstance(recorded, RecordedService)
    decode = next(p for p, name in names(events).items() if name.startswith("a: d 0"))
    for counter, key, column in (("requests", "running", "running"), ("KV cache blocks", "used", "used_blocks")):
        points = [(int(e["ts"] * 1000), e["args"][key]) for e in events if e["pid"] == decode and e["name"] == counter]
        assert points == sorted(points, key=lambda p: p[0]) and points[-1][1] == 0
        times = np.array([t for t, _ in points])
        mine = recorded.iterations["group"] == 2
        seen = np.searchsorted(times, ns(recorded.iterations["start_ps"][mine]), side="right") - 1
        assert [points[i][1] for i in seen] == recorded.iterations[column][mine].tolist()
    marks = [e for e in events if e["ph"] == "i"]
    faults = served.faults[served.faults.replica == 0]
    assert [e["ts"] / 1e6 for e in marks if e["name"] == "slow_device"] == pytest.approx(
        faults.time_s.tolist(), abs=1e-8
    )
    moved = served.rebalances[(served.rebalances.replica == 0)]
    on_decode = [e for e in marks if e["pid"] == decode and e["name"].startswith("rebalance")]
    assert len(on_decode) == int((moved.unit == "d").sum()) > 0
    assert any(e["name"] == "placement changed" for e in marks) == bool(moved.done.any())


def test_arrows_follow_caches_to_their_decodes(served: Result) -> None:
    events = parsed(served)
    (recorded,) = served.recorded
    assert isinstance(recorded, RecordedService)
    handed = (served.requests.replica == 0).sum()
    assert len(recorded.handovers) == handed
    arrows = bound(events)
    assert 0.9 * handed <= len(arrows) <= handed  # the last ones may not start another iteration
    pids = names(events)
    for prompt, decode in arrows:
        assert (prompt["name"], decode["name"]) == ("prefill", "decode") and prompt["ts"] < decode["ts"]
        assert pids[prompt["pid"]].startswith("a: p") and pids[decode["pid"]].startswith("a: d")


def test_a_long_service_is_cut_in_time(served: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 1500
    message = left_out(served, most)
    assert message.startswith("timeline leaves out all but the first ") and "of 1000 thousandths of the time" in message
    events = parsed(served, most)
    check(events)
    assert 0.9 * most < len(events) <= most
    assert {name.split(" (")[0] for name in names(events).values()} == {
        "about this trace",
        "a: p 0",
        "a: p 1",
        "a: d 0",
    }
    monkeypatch.setattr(keeping, "MOST_ITERATIONS", 30)
    few = run(SCENARIOS / "tiny.yaml", overrides=[*SERVED, "replicas=1"], timeline=True)
    (recorded,) = few.recorded
    assert isinstance(recorded, RecordedService) and len(recorded.iterations["group"]) == 30
    assert (
        left_out(few)
        == f"timeline leaves out what comes after {recorded.until_ps / 1e12:.6g} s: more than viewers open"
    )
    check(parsed(few))


def test_times_survive_both_ways_of_reading() -> None:
    rng = np.random.default_rng(0)
    for top in (10**6, 10**12, 10**17):  # a microsecond to a day
        times = np.sort(rng.integers(0, top, 2000)).tolist()
        for start, end in pairwise(times):
            for read in (lambda us: int(us * 1000.0), lambda us: round(us * 1000.0)):
                begins, spent = read(float(at(start))), read(float(lasts(start, end)))
                assert begins == start // 1000 and begins + spent == end // 1000


def test_numbers_that_json_lacks_are_left_out() -> None:
    assert (
        members({"a": float("nan"), "b": float("inf"), "c": 1, "d": True, "e": 1 / 3}) == '"c":1,"d":true,"e":0.333333'
    )
