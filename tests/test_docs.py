"""The pages of sim/docs keep their word: commands, scenarios and code run, links lead somewhere, the reference is today's."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sim import reference
from sim.catalogue import FAMILIES
from sim.loading import load
from sim.reference.kinds import shipped
from tests.snippets import FILES, ROOT, Block, anchors, blocks, commands, links, parsers, run, words_of

DOCS = ROOT / "sim" / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
WRITTEN = [page for page in PAGES if not page.startswith("reference/")]
CHINESE = "README.zh.md"
RUN = r"(?<=/)[0-9a-f]{12}\b"  # a run's own folder
NOT_RUN = ("pip ", "python -m pytest", "git ")  # of a shell block: what installs or tests
SHRUNK = """
import sim.study
from tests.snippets import TINY
whole = sim.study.run
def shrunk(source, overrides=None, **options):
    small = {key: value for key, value in (pair.split("=") for pair in TINY)}
    return whole(source, overrides=(overrides or {}) | {key: int(value) for key, value in small.items()}, **options)
sim.study.run = shrunk
"""


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


# Pages run -------------------------------------------------------------------------------------------------------


def _made(folder: Path, tokens: int) -> None:
    """What pages take for granted: the shipped scenarios, a recorded trace and a table of measured kernels."""
    shutil.copytree(ROOT / "scenarios", folder / "scenarios")
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.standard_normal((2, tokens, 16)) + 2 * rng.standard_normal((2, 1, 16)), axis=2)[:, :, :2]
    np.savez(folder / "TRACE.npz", topk_ids=ids.astype(np.int16), seqlens=np.full(tokens // 100, 100))
    rows = [
        {"kernel_source": "moe_torch_flow_cutlass", "moe_dtype": "fp8_block", "num_tokens": tokens, "hidden_size": 2048,
         "inter_size": inter, "topk": 4, "num_experts": 32, "moe_tp_size": 1, "moe_ep_size": ep, "distribution": "balanced",
         "latency_ms": 0.02 + tokens / ep * inter * 1e-9 + 32 / ep * inter * 2e-9}
        for tokens in (16, 256, 4096, 16384) for inter in (768, 1536) for ep in (1, 4)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "moe_h100_sxm_trtllm.parquet")


@pytest.fixture
def box(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout, to run a page in; advice needs a longer trace than a fit."""
    _made(tmp_path, 6400 if "sim.advise" in text_of(page) else 3200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def _run_shell(block: Block, box: Path, capsys: pytest.CaptureFixture[str], quoted: bool) -> str:
    """Run the commands of a block; shipped scenarios as they are, which tests/test_scenarios.py runs, only if ``quoted``."""
    said = ""
    for words in commands(block):
        line = " ".join(words)
        plain = re.fullmatch(r"python -m sim\.run scenarios/(\w+)\.yaml", line)
        if line.startswith(NOT_RUN) or (plain and plain[1] in FILES and not quoted):
            continue
        if words[:2] == ["python", "-m"]:
            assert run(words, block.extra) == 0, f"{line}\n{capsys.readouterr().err}"
            said += "".join(capsys.readouterr())
        else:
            assert words[0] == "python" and words[1].endswith(".py"), f"not a known command: {line}"
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=box, env=env, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            said += done.stdout + done.stderr
    return said


def _load_fragment(block: Block, box: Path) -> None:
    """A piece of a scenario has to fit into one that has policies and serves, or runs steps."""
    file = box / "scenarios" / "fragment.yaml"
    base = "policies.yaml" if "policies/" in block.text else "tiny.yaml"
    file.write_text(f"extends: {base}\nname: fragment\n{block.text}", encoding="utf-8")
    load(file)


@pytest.mark.parametrize("page", [page for page in WRITTEN if page != CHINESE and blocks(text_of(page))])
def test_page_runs(page: str, box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From top to bottom, in one folder; quoted output has the words and headings of what was printed last."""
    said = ""
    found = blocks(text_of(page))
    for block, below in itertools.zip_longest(found, found[1:]):
        if block.file:
            (box / block.file).parent.mkdir(parents=True, exist_ok=True)
            (box / block.file).write_text(block.text, encoding="utf-8")
            if block.file.startswith("scenarios/") and block.text.count("\npolicies:"):
                load(box / block.file)
        elif block.language == "bash":
            said = _run_shell(block, box, capsys, quoted=below is not None and below.language == "text")
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), {"__name__": "page"})
            said = "".join(capsys.readouterr())
        elif block.language == "yaml":
            _load_fragment(block, box)
        elif block.language == "text":
            _quoted(block.text, said, loose=block.loose)


def _quoted(quoted: str, said: str, *, loose: bool = False) -> None:
    missing = [] if loose else [word for word in dict.fromkeys(words_of(quoted)) if word not in said]
    assert not missing, f"{missing} of a quoted output are not in\n{said}"
    lines, printed = (
        [" ".join(re.sub(RUN, "", line).split()) for line in text.splitlines()] for text in (quoted, said)
    )
    headings = [line for line, below in itertools.pairwise(lines) if set(below) == {"-", " "}]
    assert not [line for line in headings if line not in printed], said


def test_quoted_output_is_compared() -> None:
    with pytest.raises(AssertionError, match="affinty"):
        _quoted("policy  kept affinty\n", "policy  kept affinity\n")
    with pytest.raises(AssertionError):
        _quoted("policy  kept\n------  ----\n", "policy  affinity  kept\n")


def test_chinese_page_says_what_others_say() -> None:
    """Its commands are those of pages that run, its quoted output is the README's."""
    others = (ROOT / "README.md").read_text(encoding="utf-8") + "".join(
        text_of(page) for page in WRITTEN if page != CHINESE
    )
    for block in blocks(text_of(CHINESE)):
        assert block.language in ("bash", "text")
        assert not [line for line in block.text.splitlines() if line not in others]


# Links, options, files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    broken = []
    for target in links(text_of(page)):
        name, _, anchor = target.partition("#")
        file = (DOCS / page).parent / name if name else DOCS / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


def test_options_that_pages_name_exist() -> None:
    known = {option for one in parsers() for action in one._actions for option in action.option_strings}
    for page in WRITTEN:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text_of(page))) - known
        assert not unknown, f"{page} names {sorted(unknown)}"


def test_files_that_pages_name_exist() -> None:
    for page in WRITTEN:
        named = set(re.findall(r"`((?:sim|tests|analysis|scenarios)/[\w./-]+)`", text_of(page)))
        written = {block.file for block in blocks(text_of(page))}
        missing = [name for name in sorted(named) if not (ROOT / name).exists() and name not in written]
        assert not missing, f"{page} names {missing}"


def test_every_page_is_in_the_index() -> None:
    index = links(text_of("index.md"))
    assert not [page for page in PAGES if page != "index.md" and page not in index]


def test_formulas_survive_markdown() -> None:
    """Inline mathematics with a backslash before punctuation loses it on GitHub."""
    for page in WRITTEN:
        prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text_of(page), flags=re.M | re.S)
        formulas = re.findall(r"\$[^$]+\$", prose)
        assert prose.count("$") == 2 * len(formulas), page
        assert not [formula for formula in formulas if re.search(r"\\[^a-zA-Z\s]", formula) or "\n" in formula], page


# The reference ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


def test_reference_is_todays(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        assert (DOCS / "reference" / name).read_text(encoding="utf-8") == text, "run python -m sim.reference"


def test_a_stale_page_is_named(pages: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "pages", lambda: pages)
    for name, text in pages.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert reference.stale(tmp_path) == []
    (tmp_path / "plugins.md").write_text(
        pages["plugins.md"].replace("group_limited", "group_limitd", 1), encoding="utf-8"
    )
    (tmp_path / "metrics.md").unlink()
    assert reference.stale(tmp_path) == ["plugins.md", "metrics.md"]


def test_every_key_has_a_meaning(pages: dict[str, str]) -> None:
    rows = [
        line for name in ("scenario.md", "plugins.md") for line in pages[name].splitlines() if line.startswith("| `")
    ]
    assert len(rows) > 300
    assert not [row for row in rows if row.endswith("|  |")]


def test_every_kind_has_a_section_with_its_source(pages: dict[str, str]) -> None:
    text = pages["plugins.md"]
    for where, base in FAMILIES.items():
        family = where.replace("policies[].", "").rpartition(".")[2]
        for kind, cls in shipped(base).items():
            assert f"\n### {family}: {kind}\n" in text
            assert (ROOT / f"{cls.__module__.replace('.', '/')}.py").is_file()


def test_words_come_from_docstrings() -> None:
    from sim.gating.balance.bias import Bias
    from sim.reference.words import described, markdown
    from sim.settings import Steps

    assert described(Bias).fields["bias_update_rate"].startswith("u (called gamma")
    assert described(Steps).fields["timed"] == "Steps whose time is simulated."
    assert "bias_update_rate: u" not in described(Bias).prose
    assert markdown("Of ``a|b`` <x>, 2 * 3:\n\n>>> 1\n1\n") == "Of `a|b` &lt;x>, 2 \\* 3:\n\n```pycon\n>>> 1\n1\n```"


def test_check_says_what_is_out_of_date(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sim.reference import __main__ as door

    monkeypatch.setattr(door, "stale", lambda: ["plugins.md"])
    assert door.main(["--check"]) == 1
    assert "plugins.md is out of date" in capsys.readouterr().err
