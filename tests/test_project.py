"""The project keeps its word: the README runs, shipped files work, floors hold, the lock and the licence are whole."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import sim
from sim.run import main
from tests.snippets import parsers, run

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHECKS = PYPROJECT["tool"]["importlinter"]
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))
# What makes the big scenarios run in about a second.
BATCH = ["steps.count=1", "steps.warmup.steps=0", "traffic.tokens_per_rank=32"]
SHALLOW = ["model.num_hidden_layers=5", "parallel.pp_size=1"]


OPTIMIZE = (
    "python -m sim.optimize scenarios/tiny.yaml --vary gating.select.topk_group=1,2 "
    "--minimize step_time_s max_vio_batch --maximize kept_affinity"
)
VALIDATE = "python -m sim.validate --group gating --group geometry"


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the arguments of every ``python -m sim.run`` line of the README's shell blocks, each once."""
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    found = [line[3:] for line in lines if line[:3] == ["python", "-m", "sim.run"]]
    return [args for i, args in enumerate(found) if args not in found[:i]]


def sets(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


# The README ------------------------------------------------------------------------------------------------------


def test_shell_blocks_hold_only_known_commands() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    others = [line for line in lines if not line.startswith("python -m sim.run ")]
    assert others == ["pip install -e '.[dev]'", "python -m pytest", OPTIMIZE, VALIDATE]
    assert len(commands()) >= 4


@pytest.mark.parametrize("args", commands(), ids=" ".join)
def test_command_of_the_readme_runs(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    extra = ["--out", str(tmp_path)]
    if "scenarios/v3.yaml" in args:
        extra += sets([*BATCH, *SHALLOW])
    assert main([*args, *extra]) == 0
    out, err = capsys.readouterr()
    assert out and "Traceback" not in err
    assert bool(list(tmp_path.rglob("manifest.json"))) == (not {"--list", "--dry-run"} & set(args))


def test_validate_command_of_the_readme_meets_every_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from sim.validate import main as validate

    assert validate(VALIDATE.split()[3:]) == 0
    text = capsys.readouterr().out
    assert "MISS" not in text and re.search(r"\n(\d+) of \1 predictions within their bars; 0 calibration rows\n", text)


def test_optimize_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a smaller scenario; the quoted table has today's heads."""
    monkeypatch.chdir(ROOT)
    assert run(shlex.split(OPTIMIZE), ["--out", str(tmp_path)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    (quoted,) = [block for block in blocks("text") if block.lstrip().startswith("step") and "trial" in block]
    heads = [line.split() for line in quoted.splitlines()[:3]]
    assert len(heads[2]) >= 6 and not [line for line in heads if line not in printed]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_block_of_the_readme_runs(code: str) -> None:
    """In a process of its own, as a reader runs it; warnings are errors there."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_quoted_refusal_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quoted = [
        line for block in blocks("text") for line in block.splitlines() if re.match(r"scenarios/\S+:\d+:\d+: ", line)
    ]
    assert quoted
    shutil.copytree(ROOT / "scenarios", tmp_path / "scenarios")
    for text in quoted:
        match = re.fullmatch(r"(\S+):(\d+):(\d+): \S*?(\w+): unknown key \[got .*\] \(did you mean (\w+)\?\)", text)
        assert match, text
        file, line, column, wrong, right = match.groups()
        rows = (ROOT / file).read_text(encoding="utf-8").splitlines()
        row, at = rows[int(line) - 1], int(column) - 1
        assert row[at:].startswith(f"{right}:"), f"{file}:{line}:{column} does not hold the key {right}"
        rows[int(line) - 1] = row[:at] + wrong + row[at + len(right) :]
        (tmp_path / file).write_text("\n".join(rows) + "\n", encoding="utf-8")
        assert main([str(tmp_path / file), "--out", "-"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err == f"{tmp_path / file}{text.removeprefix(file)}\n"


def test_quoted_tables_have_todays_headings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "scenarios" / "v3.yaml"), "--out", "-", "--quiet", *sets(BATCH)]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (quoted,) = [block for block in blocks("text") if block.startswith("v3: ")]
    lines = [" ".join(line.split()) for line in quoted.splitlines()]
    assert lines[0] == printed[0]
    headings = [line for line in lines if line and not re.search(r"\d", line.replace("95 %", "")) and "---" not in line]
    assert len(headings) >= 4
    assert not [line for line in headings if line not in printed]
    assert lines[-1].startswith("(floor)") and lines[-1].split(";")[0] in [line.split(";")[0] for line in printed]


def test_options_and_files_the_readme_names_exist() -> None:
    known = {option for one in parsers() for action in one._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) <= known
    named = set(re.findall(r"`((?:sim|tests|analysis|scenarios)/[\w./]+)`", README))
    named |= set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert len(named) >= 10
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_readme_lists_every_scenario() -> None:
    listed = set(re.findall(r"^\| `(\w+)\.yaml` \|", README, flags=re.MULTILINE))
    assert listed == {path.stem for path in SCENARIOS}
    n_models = len(list((ROOT / "scenarios" / "models").glob("*.yaml")))
    assert f"holds {n_models} models" in README


# Shipped scenarios -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that give `replay.yaml` a recorded trace: topk_ids [17 layers, 8192 tokens, 6 of 64 experts]."""
    first = np.random.default_rng(0).integers(64, size=(17, 8192, 1), dtype=np.int16)
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    np.savez(path, topk_ids=(first + 7 * np.arange(6, dtype=np.int16)) % 64)
    return [f"traffic.path={path}"]


def test_real_trace_tells_its_own_imbalance(shared: Path) -> None:
    recorded = shared / "data" / "esft_deepseek_v2_lite" / "law_layers1-16.npz"
    result = sim.run(ROOT / "scenarios" / "replay.yaml", overrides=[f"traffic.path={recorded}", "replicas=1"])
    # Published statistics of the whole law trace: MaxVio 2.52 on average over layers; here its first 8,192 tokens.
    assert 2.0 < result.layers.max_vio.mean() < 2.9


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_scenario_dry_runs(path: Path, trace: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At full size, as shipped; what it prints is a scenario that resolves to itself."""
    extra = sets(trace) if path.stem == "replay" else []
    assert main([str(path), "--dry-run", *extra]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# would run: ") and "# too big" not in printed
    (tmp_path / "again.yaml").write_text(printed, encoding="utf-8")
    assert main([str(tmp_path / "again.yaml"), "--dry-run", *extra]) == 0
    assert capsys.readouterr().out == printed


def test_replay_runs_reduced(trace: list[str]) -> None:
    """The one scenario that tests/test_scenarios.py cannot run: it needs a trace."""
    result = sim.run(
        ROOT / "scenarios" / "replay.yaml", overrides=["steps.count=1", "traffic.tokens_per_rank=64", *trace]
    )
    tokens = result.experts.groupby("policy").tokens.sum()
    assert (tokens == 8 * 64 * 16 * 6 * result.scenario.replicas).all() and len(tokens) == 3
    assert (result.steps.step_time_s > 0).all()


# Imports ---------------------------------------------------------------------------------------------------------


def floors(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the packages and the rules, to break."""
    for name in ("sim", "analysis"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb", "*.png"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_floors_hold(copy: Path) -> None:
    done = floors(copy)
    assert done.returncode == 0, done.stdout
    assert f"{len(CHECKS['contracts'])} kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "imports"),
    [
        ("units", "sim.rollout"),
        ("kernels.plain", "sim.gating"),
        ("network", "sim.cluster"),
        ("placement.linear", "sim.traffic"),  # siblings
        ("cost.port", "sim.cluster"),
        ("cost.roofline", "simpy"),
        ("rollout", "sim.engine"),
        ("engine.des", "sim.study"),
        ("study", "sim.report"),
        ("results", "analysis.figures"),
    ],
)
def test_an_import_that_goes_up_is_caught(copy: Path, module: str, imports: str) -> None:
    path = copy / "sim" / f"{module.replace('.', '/')}.py"
    path.write_text(
        path.read_text(encoding="utf-8") + f"\n\ndef _late() -> None:\n    import {imports}\n", encoding="utf-8"
    )
    done = floors(copy)
    assert done.returncode != 0 and "1 broken" in done.stdout
    assert re.search(rf"sim\.{re.escape(module)} -> {re.escape(imports)}\b", done.stdout), done.stdout


def test_every_module_has_a_floor() -> None:
    (layers,) = [contract["layers"] for contract in CHECKS["contracts"] if contract["type"] == "layers"]
    placed = [name.strip() for layer in layers for name in re.split(r"[:|]", layer)]
    assert len(placed) == len(set(placed))
    there = {path.stem for path in (ROOT / "sim").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert set(placed) == {f"sim.{name}" for name in there - {"__init__"}} | {"analysis"}


def test_a_small_run_loads_nothing_heavy() -> None:
    """Help needs argparse only; a run without result files needs no data frame, graph, compiler or figure library."""
    code = f"""
import contextlib, io, sys
import sim.run
sim.run.parser().format_help()
print(sorted({{"numpy", "pydantic", "ruamel"}} & set(sys.modules)))
args = ["scenarios/tiny.yaml", "--out", "-", "--quiet", *{sets(["replicas=1", *BATCH])!r}]
with contextlib.redirect_stdout(io.StringIO()):
    assert sim.run.main(args) == 0
heavy = {{"networkx", "scipy", "pandas", "pyarrow", "numba", "matplotlib", "seaborn", "tqdm"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[]", "[]"], done.stdout + done.stderr


# Files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """The files git tracks, or skip outside a checkout."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_top_level_is_the_agreed_one(tracked: list[Path]) -> None:
    top = {path.relative_to(ROOT).parts[0] for path in tracked}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "requirements.lock", ".gitignore"}
    assert top <= {"sim", "scenarios", "analysis", "tests", ".ci"} | files


def machine_paths(text: str) -> list[str]:
    return re.findall(r"(?<![\w.)}/])/(?:work|tmp|root|home|opt|Users|mnt)/[\w.-]+|file:///?\w+", text)


def test_no_file_names_a_machine(tracked: list[Path]) -> None:
    planted = "see /" + "work/main, or file:/" + "//x"
    assert len(machine_paths(planted)) == 2  # the search finds what is there
    found = {}
    for path in tracked:
        if path.suffix not in (".png", ".npz"):
            here = machine_paths(path.read_text(encoding="utf-8"))
            if here:
                found[path.relative_to(ROOT).as_posix()] = here
    assert not found


def test_files_are_small_text_without_carriage_returns(tracked: list[Path]) -> None:
    for path in tracked:
        data = path.read_bytes()
        assert len(data) < 2**20, path
        if path.suffix != ".png":
            assert b"\r" not in data and data.endswith(b"\n"), path


def test_ci_script_can_be_executed(tracked: list[Path]) -> None:
    script = ROOT / ".ci" / "run"
    assert script in tracked and script.stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def locked() -> dict[str, str]:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==([\w.+-]+)", text, flags=re.MULTILINE)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock_pins_every_requirement_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text and "--index" not in text and "--find-links" not in text
    entries = re.split(r"\n(?=\S)", text.strip())
    assert all(re.match(r"[\w.-]+==\S+.*\\\n    --hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    pinned = {canonical(name): version for name, version in locked().items()}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    brought = [name for line in extras["dev"] for name in Requirement(line).extras]
    lists = [project["dependencies"], extras["dev"], *(extras[name] for name in brought)]
    wanted = [Requirement(line) for items in lists for line in items]
    for requirement in wanted:
        if requirement.name != "gatesim":
            assert pinned[canonical(requirement.name)] in requirement.specifier, requirement


def imported(folder: str) -> set[str]:
    """Return the top-level modules that the Python files below ``folder`` import, those inside functions included."""
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                names.update(arg.value.split(".")[0] for arg in node.args if isinstance(arg, ast.Constant))
    return names


def test_requirements_are_what_the_code_imports() -> None:
    modules = {"ruamel.yaml": "ruamel"}
    project = PYPROJECT["project"]
    lists = [
        project["dependencies"],
        *(items for name, items in project["optional-dependencies"].items() if name != "dev"),
    ]
    declared = {modules.get(name, name) for items in lists for name in (Requirement(line).name for line in items)}
    comes_with = {"pydantic_core", "markupsafe", "dask", "IPython"}  # of pydantic, jinja2, distributed, ipykernel
    ours = {"sim", "analysis", "__future__"}
    used = {name for folder in ("sim", "analysis") for name in imported(folder)}
    assert used - set(sys.stdlib_module_names) - ours - comes_with == declared - {
        "ipykernel",
        "aiconfigurator-core",
    }  # started by nbclient; found by its files


def test_version_licence_and_changelog_agree() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, flags=re.MULTILINE)
    assert newest and newest[1] == sim.__version__
    lines = re.findall(r"^- .*", changelog, flags=re.MULTILINE)
    assert lines and all(re.match(r"- \[(NEW|CHANGE|FIX|BREAKING)\] ", line) for line in lines)
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
