"""``python -m sim.run``: what it prints where, its exit status, and what a signal leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sim.estimate
from sim.catalogue import FAMILIES
from sim.estimate import Estimate, estimate, events_per_step
from sim.loading import load
from sim.plugin import members
from sim.rollout import token_layers
from sim.run import main
from sim.store import resolved_data, run_id
from sim.study import simulate

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "scenarios" / "tiny.yaml")
SMALL = ["replicas=1", "steps.count=1", "steps.warmup.steps=2", "traffic.tokens_per_rank=32"]
SETS = [word for text in SMALL for word in ("--set", text)]
# About a minute of work on one core, in tasks of many seconds.
LONG = [word for text in ("steps.count=4000", "traffic.tokens_per_rank=512") for word in ("--set", text)] + ["--quiet"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str, code: str = "", **options: Any) -> subprocess.Popen[str]:
    head = ["-c", code] if code else ["-m", "sim.run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *head, *arguments], text=True, env=environment, **streams)


def run(*arguments: str, **options: Any) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def visible(place: Path) -> list[str]:
    """Everything but hidden folders and what is in them, as paths below ``place``."""
    found = [path.relative_to(place) for path in place.rglob("*")]
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


# --- what is printed ---


def test_help_and_errors_before_a_scenario_import_nothing_heavy() -> None:
    code, out, imports = run("-X", "importtime", "-m", "sim.run", "--help", code="import sys, subprocess; "
        "sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))")  # fmt: skip
    assert code == 0 and out.startswith("usage: python -m sim.run") and "exit status: 0 done" in out
    modules = [line.rpartition("|")[2].strip() for line in imports.splitlines() if line.startswith("import time:")]
    assert "argparse" in modules
    heavy = {"numpy", "pydantic", "ruamel", "numba", "pandas", "pyarrow", "simpy", "networkx", "scipy", "tqdm"}
    assert not heavy & {module.partition(".")[0] for module in modules}


def test_a_small_run_loads_no_library_that_it_does_not_need() -> None:
    code = (
        "import sys; from sim.run import main; status = main(sys.argv[1:]); "
        "print(sorted({'networkx', 'pandas', 'numba', 'seaborn', 'matplotlib', 'tqdm', 'scipy.stats'} & set(sys.modules))); "
        "sys.exit(status)"
    )
    status, out, _ = run(TINY, *SETS, "--out", "-", code=code)
    assert status == 0 and out.splitlines()[-1] == "[]"


def test_list_names_every_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    captured = capsys.readouterr()
    rows = [line.split(maxsplit=2) for line in captured.out.splitlines()]
    assert [(row[0], row[1]) for row in rows] == [
        (where, kind) for where, base in FAMILIES.items() for kind in members(base)
    ]
    assert all(len(row) == 3 and row[2].endswith(".") for row in rows), "every plug-in has a one-line description"
    assert captured.err == ""


def fits(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """The part of JSON Schema that ours uses."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        return fits(value, root["$defs"][name], root)
    if "anyOf" in schema:
        return any(fits(value, choice, root) for choice in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kind = schema.get("type")
    if kind == "object":
        if not isinstance(value, dict) or not set(schema.get("required", [])) <= set(value):
            return False
        known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, item in value.items():
            rule = known.get(key, other)
            if rule is False or (isinstance(rule, dict) and not fits(item, rule, root)):
                return False
        return True
    if kind == "array":
        return isinstance(value, list) and all(fits(item, schema.get("items", {}), root) for item in value)
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    types: dict[Any, Any] = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "null": type(None)}
    return kind is None or isinstance(value, types[kind])


def test_schema_describes_resolved_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"name", "model", "cluster", "traffic", "policies"} <= set(schema["required"])
    data = resolved_data(load(TINY))
    assert fits(data, schema, schema)
    for spoil in (
        lambda d: d.pop("model"),
        lambda d: d.update(sed=1),
        lambda d: d["model"].update(hidden_size="wide"),
        lambda d: d["policies"][1].update(selekt="topk"),
        lambda d: d["policies"][0]["select"].update(kind="topq"),
        lambda d: d["cluster"]["intra_node"].update(latency_s=[1]),
    ):
        bad = json.loads(json.dumps(data))
        spoil(bad)
        assert not fits(bad, schema, schema)


@pytest.mark.parametrize("file", ["tiny", "v3", "dense", "loss_free", "v2", "mixtral", "kimi_k2"])
def test_dry_run_prints_a_scenario_that_runs_by_itself(
    place: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    assert main([str(ROOT / "scenarios" / f"{file}.yaml"), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and visible(place) == []
    assert captured.out.startswith("# would run: ") and "token-layers to route" in captured.out.splitlines()[0]
    (place / "again.yaml").write_text(captured.out, encoding="utf-8")
    original, again = load(ROOT / "scenarios" / f"{file}.yaml"), load(place / "again.yaml")
    assert again == original and run_id(again) == run_id(original)
    assert main(["again.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out == captured.out


def test_results_go_to_stdout_and_their_path_to_stderr(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *SETS, "--out", "out"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("tiny: toy, ") and all(p.name in captured.out for p in load(TINY).policies)
    (line,) = captured.err.splitlines()  # no bar, no estimate: this is no terminal
    folder = Path(line.removeprefix("results: ").partition(" (")[0])
    assert folder.parent == Path("out/tiny") and (place / folder / "manifest.json").is_file()
    assert [Path(name).name for name in visible(place / folder)] == [
        "devices.parquet", "experts.parquet", "layers.parquet", "manifest.json", "scenario.yaml", "steps.parquet",
        "summary.csv", "topics.parquet", "totals.parquet",
    ]  # fmt: skip


def test_a_long_run_says_so_and_shows_how_far_it_is(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.run.LONG_S", 0.0)
    assert main([TINY, *SETS, "--out", "-"]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"tiny: {estimate(load(TINY, SMALL))}"
    assert main([TINY, *SETS, "--out", "-", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_out_dash_writes_nothing_and_quiet_says_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *SETS, "--out", "-"]) == 0
    first = capsys.readouterr()
    assert visible(place) == [] and first.err == "" and "tiny: toy" in first.out
    assert main([TINY, *SETS, "--quiet"]) == 0
    second = capsys.readouterr()
    assert second.err == "" and second.out == first.out and "results/tiny" in visible(place)


def test_a_page_and_a_timeline_are_part_of_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *SETS, "--report", "--timeline", "--out", "first"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["results", "report", "timeline"]
    page, trace = (place / line.partition(": ")[2] for line in lines[1:])
    assert f"python -m sim.run {TINY}" in page.read_text(encoding="utf-8")
    assert len(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]) > 100
    manifest = json.loads((page.parent / "manifest.json").read_text(encoding="utf-8"))
    assert {page.name, trace.name} <= set(manifest["sha256"])
    assert main([TINY, *SETS, "--set", "steps.timed=none", "--timeline", "--quiet"]) == 0
    assert capsys.readouterr().err == "tiny: no timeline: no step is timed (steps.timed: none)\n"
    assert main([TINY, *SETS, "--report", "--out", "-"]) == 2
    assert capsys.readouterr().err.startswith("--report and --timeline write into the folder of results")


def test_a_page_that_fails_costs_no_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sim.report import html

    def fails(error: BaseException) -> Callable[..., str]:
        def page(*arguments: Any) -> str:
            raise error

        return page

    for error, status, says in (
        (RuntimeError("no ink"), 1, "tiny: no report.html: RuntimeError: no ink"),
        (ValueError("odd"), 1, "tiny: no report.html: ValueError: odd"),
        (KeyboardInterrupt(), 130, "interrupted while making report.html; the results are in "),
    ):
        monkeypatch.setattr(html, "page", fails(error))
        assert main([TINY, *SETS, "--report", "--quiet"]) == status
        captured = capsys.readouterr()
        assert captured.err.startswith(says) and captured.out.startswith("tiny: toy, ")
        (folder,) = (place / "results" / "tiny").iterdir()
        assert (folder / "manifest.json").is_file() and not (folder / "report.html").exists()
        shutil.rmtree(place / "results")


def test_several_files_are_all_checked_before_one_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "two.yaml").write_text(f"extends: {TINY}\nname: two\n", encoding="utf-8")
    assert main([TINY, "two.yaml", *SETS]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and "two.yaml:1:1: extends: leaves the folder" in captured.err
        and visible(place) == ["two.yaml"]
    )
    # Options may stand between the files.
    assert main([TINY, "--allow-outside", *SETS, "two.yaml"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if ": toy," in line] == [
        "tiny",
        "two",
    ]
    assert sorted(path.name for path in (place / "results").iterdir()) == ["tiny", "two"]


def test_seed_and_replicas_are_overrides(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TINY, *SETS, "--seed", "7", "--replicas", "2"]) == 0
    (written,) = (place / "results").rglob("scenario.yaml")
    scenario = load(written)
    assert (scenario.seed, scenario.replicas) == (7, 2)
    assert scenario == load(TINY, [*SMALL, "seed=7", "replicas=2"])
    capsys.readouterr()
    assert main([TINY, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "--set seed=-1: seed: must be >= 0 [got -1]\n"


def test_usage_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], "no scenario given; try: python -m sim.run scenarios/tiny.yaml"),
        ([TINY, "--jobs", "0"], "--jobs must be at least 1 [got 0]"),
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["."], "is a folder, not a file"),
        ([TINY, "--set", "seed"], "--set seed: seed: must be written key.key=value"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == ""
    for arguments in ([TINY, "--sed", "1"], [TINY, "--seed", "one"], [TINY, "--jobs", "1.5"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["file", "file/below", "closed/below"])
def test_a_bad_place_for_results_is_refused_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (place / "file").write_text("", encoding="utf-8")
    (place / "closed").mkdir(mode=0o500)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and allowed(path, mode))
    monkeypatch.setattr("sim.study.simulate", lambda *_, **__: pytest.fail("simulated"))
    assert main([TINY, "--out", out]) == 2
    assert capsys.readouterr().err.startswith(f"tiny: --out {out}: {place}")
    assert visible(place) == ["closed", "file"]


def test_a_reader_that_leaves_early_costs_no_results(place: Path) -> None:
    process = start(TINY, *SETS)
    assert process.stdout and process.stderr
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    assert len(err.splitlines()) == 1 and err.startswith("results: ")
    assert len(list((place / "results" / "tiny").iterdir())) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        status, _, err = run("--list", stdout=full)
    assert status == 2 and "No space left" in err and "Traceback" not in err


def test_an_ascii_terminal_gets_the_table(place: Path) -> None:
    settings = ["--set", "replicas=2", "--out", "-"]
    status, out, err = run(TINY, *SETS, *settings, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert status == 0 and err == "" and out.isascii() and " ?" in out


# --- the estimate ---


def test_the_estimate_of_the_tiny_scenario_by_hand() -> None:
    scenario = load(TINY)
    # Five policies, three replicas, three MoE layers; two of them settle their bias on 30 batches of 8 x 128 tokens.
    assert token_layers(scenario) == 3 * 3 * (5 * 4 * 8 * 256 + 2 * 30 * 8 * 128)
    # Per MoE layer attention, dispatch, experts, combine and the shared expert, and two per dense layer; forward and
    # backward; the experts' weight gradients on their own; two micro-batches on eight ranks, five policies.
    assert events_per_step(scenario) == (2 * (3 * 5 + 2) + 3) * 2 * 8 * 5
    assert estimate(scenario).events == 3 * events_per_step(scenario)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["schedule.phase=forward"],
        ["schedule.overlap=none"],
        ["schedule.overlap=forward_backward", "schedule.micro_batches=4"],
        ["parallel.tp_size=2"],
        ["model.n_shared_experts=0", "steps.timed=all"],
        ["schedule.phase=forward", "cost.mode=low_latency", "schedule.micro_batches=1"],
        ["steps.timed=none"],
    ],
)
def test_estimated_events_are_near_those_processed(overrides: list[str]) -> None:
    scenario = load(TINY, [*SMALL, "steps.count=2", *overrides])
    expected = estimate(scenario)
    actual = simulate(scenario, 1, expected).n_events
    assert actual <= 1.5 * expected.events and expected.events <= 1.5 * actual


def test_the_estimate_grows_with_the_work() -> None:
    base = estimate(load(TINY, SMALL))
    assert base.memory_bytes > 0 and base.seconds > 0 and not base.too_big and base.reason == ""
    for more in (
        "steps.count=50",
        "replicas=9",
        "traffic.tokens_per_rank=4096",
        "steps.warmup.steps=5000",
        "model.n_routed_experts=256",
        "cluster.nodes=4000",
    ):
        grown = estimate(load(TINY, [*SMALL, more]))
        assert grown.seconds > base.seconds and grown.memory_bytes >= base.memory_bytes, more
    slower = estimate(load(TINY, [*SMALL, "steps.warmup.steps=5000"]))
    unbiased = estimate(load(TINY, [*SMALL, "steps.warmup.steps=5000", "policies=[{name: a}]"]))
    assert unbiased.seconds < slower.seconds, "gates without a balancing rule are not warmed up"
    assert estimate(load(TINY, [*SMALL, "schedule.engine=max_plus"])).events == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["replicas=10000", "steps.timed=all"], "events exceed 1e+08: time fewer steps (steps.timed: last)"),
        (["steps.count=100000", "traffic.tokens_per_rank=8192"], "hours on one core exceed 6: lower steps.count = 100000"),
        (["steps.warmup.steps=100000", "steps.warmup.tokens_per_rank=10000"], "hours on one core exceed 6"),
        (["steps.count=1000000"], "of memory exceeds half of the free 17.2 GB: lower steps.count = 1000000"),
        (["cluster.nodes=1000000000"], "of memory exceeds half of the free 17.2 GB"),
        (["steps.warmup.tokens_per_rank=100000000"], "of memory exceeds half of the free 17.2 GB"),
    ],
)  # fmt: skip
def test_too_big_is_refused_at_once_with_the_knobs(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    monkeypatch.setattr(sim.estimate, "free_memory_bytes", lambda: 16 * 2.0**30)
    monkeypatch.setattr("sim.study.simulate", lambda *_, **__: pytest.fail("simulated"))
    sets = [word for text in overrides for word in ("--set", text)]
    begun = time.monotonic()
    assert main([TINY, *sets]) == 2
    assert time.monotonic() - begun < 5
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.endswith("; --force runs it all the same\n")
    assert captured.err.startswith("tiny: too big: ") and visible(place) == []
    assert main([TINY, *sets, "--dry-run"]) == 0
    second = capsys.readouterr().out.splitlines()[1]
    assert second.startswith("# too big: ") and words in second


def test_force_runs_what_is_too_big(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sim.estimate, "MAX_EVENTS", 10)
    assert main([TINY, *SETS]) == 2
    assert "tiny: too big: " in capsys.readouterr().err and visible(place) == []
    assert main([TINY, *SETS, "--force"]) == 0
    assert "results: " in capsys.readouterr().err and visible(place)


def test_the_estimate_reads_as_text() -> None:
    text = str(Estimate(token_layers=3_000_000, events=2500, memory_bytes=3e8, seconds=90.0, reason=""))
    assert text == "3 Mtoken-layers to route, 2.5 kevents, about 300 MB of memory and 90 s on one core"


# --- signals ---


@pytest.mark.parametrize(("jobs", "delay"), [("1", 0.2), ("1", 4.0), ("2", 6.0)])
def test_ctrl_c_ends_a_run_at_once_and_leaves_nothing(place: Path, jobs: str, delay: float) -> None:
    """While Python starts, in the simulation, and in the workers."""
    process = start(TINY, *LONG, "--jobs", jobs, start_new_session=True)
    time.sleep(delay)
    assert process.poll() is None
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to workers too
    out, err = process.communicate(timeout=30)
    if delay >= 1 or process.returncode == 130:  # before that, Python itself may still be starting
        assert process.returncode == 130, err
        assert err == "interrupted; nothing of the run in progress was written\n" and out == ""
    assert time.monotonic() - begun < 4
    assert list(place.rglob("*")) == []
    wait_until(lambda: not alive_group(process.pid))


def test_an_interrupt_that_an_import_swallows_is_not_lost(place: Path) -> None:
    """Some packages catch everything while they start; the run ends at the next checkpoint all the same."""
    code = (
        "import os, signal, sys, sim.run, sim.loading as s\n"
        "def load(*a, real=s.load, **k):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException: pass\n"
        "    return real(*a, **k)\n"
        "s.load = load\n"
        f"sys.exit(sim.run.main([{TINY!r}, *{LONG!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "interrupted; nothing of the run in progress was written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_killed_run(place: Path, number: signal.Signals) -> None:
    process = start(TINY, *LONG, "--jobs", "2", start_new_session=True, stderr=subprocess.DEVNULL)
    time.sleep(5.0)
    process.send_signal(number)  # to the parent only
    assert process.wait(30) == (130 if number == signal.SIGTERM else -number)
    wait_until(lambda: not alive_group(process.pid))
    assert list(place.rglob("*")) == []


def test_a_lost_worker_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def lose(*arguments: object, **options: object) -> None:
        raise BrokenProcessPool("a process was terminated abruptly")

    monkeypatch.setattr("sim.study.simulate", lose)
    assert main([TINY]) == 1
    assert capsys.readouterr().err.startswith("tiny: ran out of memory, or lost a process: a process was terminated")


def alive_group(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits to be reaped does not."""
    if os.path.isdir("/proc/self"):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, _, found = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(found) == group and state != "Z":
                return True
        return False
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(done: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


# Says "writing" once its temporary folder holds everything but the manifest, then waits there.
STOP_IN_WRITE = """
import sys, time
import sim.store
from sim.run import main

def wait(path):
    print("writing", flush=True)
    time.sleep(60)

sim.store._sha256 = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "older"),
    [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGKILL, False), (signal.SIGKILL, True)],
)
def test_a_signal_while_writing_leaves_no_half_folder(
    place: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, older: bool
) -> None:
    before: dict[str, bytes] = {}
    if older:
        assert main([TINY, *SETS, "--quiet"]) == 0
        before = contents(place)
    process = start(TINY, *SETS, code=STOP_IN_WRITE)
    assert process.stdout and process.stdout.readline() == "writing\n"
    strays = [path for path in (place / "results" / "tiny").iterdir() if path.name.startswith(".")]
    assert len(strays) == 1 and (strays[0] / "scenario.yaml").is_file()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    assert contents(place) == before
    assert strays[0].exists() == (number == signal.SIGKILL)  # nobody can tidy up after kill -9 ...
    assert main([TINY, *SETS, "--quiet"]) == 0
    (folder,) = (place / "results" / "tiny").iterdir()  # ... but the next run
    assert not folder.name.startswith(".") and (folder / "manifest.json").is_file()
    capsys.readouterr()


def contents(place: Path) -> dict[str, bytes]:
    """The bytes of every file outside hidden folders."""
    return {name: (place / name).read_bytes() for name in visible(place) if (place / name).is_file()}


def test_a_running_neighbour_keeps_its_temporary_folder(place: Path) -> None:
    process = start(TINY, *SETS, code=STOP_IN_WRITE)
    assert process.stdout and process.stdout.readline() == "writing\n"
    (stray,) = (place / "results" / "tiny").iterdir()
    try:
        assert main([TINY, *SETS, "--quiet"]) == 0
        assert stray.is_dir() and len(list((place / "results" / "tiny").iterdir())) == 2
    finally:
        process.kill()
        process.communicate(timeout=30)
