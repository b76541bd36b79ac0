"""Who runs the points: one contract, held by processes here, by Ray and by Dask; then what only engines have."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sim.backends import TRIES, Backend, Lost, get, names
from sim.located import ScenarioError
from sim.plugin import Plugin
from tests import backend_jobs

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"local": "concurrent", "ray": "ray", "dask": "distributed"}
ENGINES = [name for name in LIBRARY if name != "local"]


# --- one engine of each sort for all tests ---


def _ray_cluster(stack: ExitStack) -> tuple[str, Callable[[], Callable[[], None]]]:
    from sim.backends.ray import _QUIET

    os.environ.update(_QUIET)
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 * 2**20})
    stack.callback(cluster.shutdown)
    stack.callback(ray.shutdown)

    def add() -> Callable[[], None]:
        node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20, env_vars={"NODE": "added"})
        return lambda: cluster.remove_node(node, allow_graceful=False)

    return cluster.address, add


def _dask_cluster(stack: ExitStack) -> tuple[str, Callable[[], Callable[[], None]]]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    folder = stack.enter_context(_folder())
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
        "DASK_TEMPORARY_DIRECTORY": folder,
    }

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            env=environment | ({"NODE": "added"} if "--no-nanny" in arguments else {}),
            cwd=folder,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        return process

    start("scheduler", "--host", address, "--no-dashboard", "--no-show")

    def add(*options: str) -> Callable[[], None]:
        return start("worker", address, "--nthreads", "1", "--no-dashboard", *options).kill

    add("--nworkers", "2")
    import distributed

    with distributed.Client(address, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
    return address, lambda: add("--no-nanny")


def _folder() -> Any:
    import tempfile

    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Callable[[str], tuple[str, Callable[[], Callable[[], None]]]]]:
    """``cluster(name)``: address of a running cluster of that engine, and what adds a node and returns what kills it."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:

        def of(name: str) -> Any:
            pytest.importorskip(LIBRARY[name])
            if name not in found:
                found[name] = (_ray_cluster if name == "ray" else _dask_cluster)(stack)
            return found[name]

        yield of


@pytest.fixture(scope="module", params=list(LIBRARY))
def backend(request: pytest.FixtureRequest, cluster: Any) -> Iterator[Backend]:
    address = None if request.param == "local" else cluster(request.param)[0]
    with get(request.param)(2, address) as entered:
        yield entered


# --- the contract ---


def test_every_item_comes_back_once_with_its_index(backend: Backend) -> None:
    assert backend.workers == 2
    found = list(backend.run(backend_jobs.square, range(40)))
    assert sorted(found) == [(i, i * i) for i in range(40)]
    assert list(backend.run(backend_jobs.square, [])) == []


def test_an_exception_is_raised_as_it_is_and_the_backend_goes_on(backend: Backend) -> None:
    with pytest.raises(ScenarioError) as caught:
        list(backend.run(backend_jobs.fail, range(4)))
    assert type(caught.value) is ScenarioError and str(caught.value) == "a.yaml:1:1: seed: must be a number [got 'x']"
    assert sorted(backend.run(backend_jobs.fail, [3, 4])) == [(0, 3), (1, 4)]


def test_a_run_that_is_left_early_disturbs_no_later_one(backend: Backend) -> None:
    running = backend.run(backend_jobs.square, range(10))
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert sorted(backend.run(backend_jobs.square, [7, 8])) == [(0, 49), (1, 64)]


def test_an_item_whose_worker_is_killed_is_tried_again(backend: Backend, tmp_path: Path) -> None:
    found = list(backend.run(backend_jobs.die_once, [(str(tmp_path), i) for i in range(8)]))
    assert sorted(found) == [(i, i) for i in range(8)]
    assert (tmp_path / "tried").exists()


def test_an_item_that_always_kills_is_named_and_no_other(backend: Backend, tmp_path: Path) -> None:
    found = []
    with pytest.raises(Lost) as caught:
        for pair in backend.run(backend_jobs.poison, [(str(tmp_path), i) for i in range(8)]):
            found.append(pair)
    assert caught.value.index == 3 and str(caught.value).startswith(f"item 3 lost its worker {TRIES} times")
    assert len((tmp_path / "kills").read_text()) == TRIES
    assert found and all(index == x != 3 for index, x in found)
    assert sorted(backend.run(backend_jobs.square, [5])) == [(0, 25)], "lost workers are replaced"


# --- engines ---


@pytest.mark.parametrize("name", ENGINES)
def test_a_node_that_is_lost_in_the_midst_costs_only_what_it_ran(name: str, cluster: Any, tmp_path: Path) -> None:
    address, add = cluster(name)
    kill = add()
    deadline = time.monotonic() + 60
    while True:
        with get(name)(None, address) as engine:
            if engine.workers > 2:  # it has joined
                killer = threading.Thread(target=lambda: (_until(lambda: [*tmp_path.glob("*-added")]), kill()))
                killer.start()
                found = list(engine.run(backend_jobs.slowly, [(str(tmp_path), i) for i in range(12)]))
                killer.join()
                break
        assert time.monotonic() < deadline
    assert sorted(found) == [(i, i) for i in range(12)]
    tried = [path.name.partition("-")[0] for path in tmp_path.iterdir()]
    again = {x for x in tried if tried.count(x) > 1}
    assert again and again <= {path.name.partition("-")[0] for path in tmp_path.glob("*-added")}


@pytest.mark.parametrize("name", ENGINES)
def test_an_address_where_nobody_answers_is_refused_at_once(name: str) -> None:
    pytest.importorskip(LIBRARY[name])
    where = "127.0.0.1:9" if name == "ray" else "tcp://127.0.0.1:9"
    with pytest.raises(ValueError, match=f"^--address {where}: nobody answers there"):
        get(name)(1, where).__enter__()


@pytest.mark.parametrize("name", ENGINES)
def test_a_library_that_is_absent_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY[name], None)
    with pytest.raises(ValueError, match=rf"pip install 'gatesim\[{name}\]'"):
        get(name)(1, None).__enter__()


def test_a_signal_leaves_no_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from sim.backends import get; from tests.backend_jobs import sleep\n"
        "if __name__ == '__main__':\n"
        "  with get(sys.argv[1])(2, None) as backend: list(backend.run(sleep, sys.argv[2:]))"
    )
    there = [name for name, library in LIBRARY.items() if importlib.util.find_spec(library)]
    started = []
    for name, number in [*((name, signal.SIGINT) for name in there), ("local", signal.SIGKILL)]:
        mark = f"gatesim-test-{os.getpid()}-{name}-{number}"
        paths = [str(tmp_path / f"{name}-{number}-{item}") for item in "ab"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, name, *paths],
            env={**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append((process, number, mark, paths))
    for process, number, mark, paths in started:
        _until(lambda process=process, paths=paths: all(map(os.path.exists, paths)) or process.poll() is not None, 120)
        assert process.poll() is None, process.communicate()
        assert len(_marked(mark)) >= 3, "negative control"
        process.send_signal(number)
    for process, number, mark, _ in started:
        out, err = process.communicate(timeout=60)
        _until(lambda mark=mark: not _marked(mark))
        assert _marked(mark) == []
        if number == signal.SIGINT:
            assert out == "" and err.strip().endswith("KeyboardInterrupt")


def _marked(mark: str) -> list[str]:
    """Running processes that inherited ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def _until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


# --- the registry, and what is sent along ---


def test_a_file_is_a_backend() -> None:
    assert names() == sorted(LIBRARY)
    with pytest.raises(ValueError, match=r"--backend rai: must be one of dask, local, ray \(did you mean ray\?\)"):
        get("rai")


def test_plug_ins_of_other_modules_are_imported_before_the_function_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pickle

    from sim.backends._code import Shipped

    (tmp_path / "my_policies.py").write_text(
        "from typing import Literal\nfrom sim.plugin import Plugin\n"
        "class Mine(Plugin):\n    kind: Literal['mine'] = 'mine'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_policies")
    data = pickle.dumps(Shipped(backend_jobs.kinds))
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer)(None))"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, cwd=ROOT)
    assert b"'mine'" in done.stdout, done.stderr.decode()
    del sys.modules["my_policies"]


def test_a_plug_in_of_the_calling_script_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from sim.backends import _code

    class Cell(Plugin):
        kind: str = "cell"

    monkeypatch.setattr(Cell, "__module__", "__main__")
    with pytest.raises(ValueError, match="plug-in Cell stands in the calling script"):
        _code.Shipped(backend_jobs.square)
