"""The project keeps its word: README snippets run, shipped scenarios run, floors hold, nothing names a machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sim.run import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))
SMALLER = ["traffic.tokens_per_rank=32", "steps.count=1", "steps.warmup.steps=1", "steps.warmup.tokens_per_rank=32"]


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    commands = [line for block in snippets("bash") for line in block.splitlines() if line.startswith("python -m sim.run")]
    assert len(commands) >= 4
    for command in commands:
        arguments = [*shlex.split(command)[3:], "--out", str(tmp_path)]
        if "scenarios/v3.yaml" in arguments:
            arguments += [word for text in SMALLER for word in ("--set", text)]
        assert main(arguments) == 0, command
        assert capsys.readouterr().out


def test_readme_python_runs() -> None:
    blocks = snippets("python")
    assert len(blocks) >= 2
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_shipped_scenario_runs_smaller(path: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = list(SMALLER)
    if path.stem == "replay":
        sets = [f"traffic.path={shared / 'data' / 'esft_deepseek_v2_lite' / 'law_layers1-16.npz'}"]
    if path.stem == "loss_free":
        sets = ["steps.count=3", "steps.warmup.steps=0"]
    assert main([str(path), "--out", "-", *[word for text in sets for word in ("--set", text)]]) == 0
    assert "MaxVio" in capsys.readouterr().out


def test_real_trace_tells_its_own_imbalance(shared: Path) -> None:
    import sim

    trace = shared / "data" / "esft_deepseek_v2_lite" / "law_layers1-16.npz"
    result = sim.run(ROOT / "scenarios" / "replay.yaml", overrides=[f"traffic.path={trace}", "replicas=1"])
    # Published statistics of the whole law trace: MaxVio 2.52 on average over layers; here its first 8,192 tokens.
    assert 2.0 < result.layers.max_vio.mean() < 2.9


def test_floors_hold_and_the_check_can_fail(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    import shutil

    shutil.copytree(ROOT / "sim", tmp_path / "sim", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    units = tmp_path / "sim" / "units.py"
    units.write_text(units.read_text(encoding="utf-8") + "\nfrom sim import scenario\n", encoding="utf-8")
    broken = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 1 and "sim.units" in broken.stdout


def test_no_file_names_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    words = [str(ROOT.parent) + "/", str(Path.home()) + "/"]
    for name in listed.stdout.split():
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".lock"):
            text = path.read_text(encoding="utf-8")
            assert not any(word in text for word in words), name
    assert "http" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_help_needs_no_numpy() -> None:
    code = "import sys, sim.run\ntry:\n    sim.run.main(['--help'])\nexcept SystemExit:\n    pass\nassert 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60).returncode == 0
