"""What documents say, run: fenced blocks of Markdown, commands made small, links and anchors."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sim.reference import commands as command_page
from tests.test_scenarios import FILES, reduced

ROOT = Path(__file__).resolve().parents[1]


class Block(NamedTuple):
    """A fenced block. file: where its first line says it lies, or nothing. extra: arguments that make its commands small.
    loose: whether a small run may print other names and words than the quoted one."""

    language: str
    text: str
    file: str
    extra: list[str]
    loose: bool


def blocks(text: str, language: str = "") -> list[Block]:
    """Return the fenced blocks of a document, in order; of one language if given.

    A first line such as ``# scenarios/mine.yaml`` names the block's file. A comment ``<!-- small: ARGS -->`` above a block
    says with which further arguments a test runs its commands.
    """
    found = []
    for match in re.finditer(
        r"(?:^<!-- (?:small: (.*?)|(loose)) -->\n+)?^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S
    ):
        small, loose, kind, body = match.groups()
        named = re.match(r"# ([\w./-]+\.(?:yaml|py))(?: .*)?\n", body)
        found.append(Block(kind, body, named[1] if named else "", shlex.split(small or ""), loose is not None))
    return [block for block in found if language in ("", block.language)]


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a shell block as words; a backslash joins lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


TINY = [
    "replicas=2",
    "steps.count=1",
    "steps.warmup.steps=2",
    "steps.warmup.tokens_per_rank=32",
    "traffic.tokens_per_rank=64",
]
RUNNERS = ("sim.run", "sim.sweep", "sim.optimize", "sim.sensitivity", "analysis.figures")


def overrides_of(file: str) -> list[str]:
    """Return what makes a shipped scenario run in a second; nothing for other files."""
    name = Path(file).stem
    if not re.fullmatch(r"scenarios/\w+\.yaml", file) or name not in FILES:
        return []
    return TINY if name == "tiny" else reduced(name)


def small(words: list[str], extra: list[str]) -> list[str]:
    """Return the arguments of ``python -m MODULE ARGS`` with what makes it quick; points run here, whatever it says."""
    args = words[3:]
    if words[2] not in RUNNERS:
        return [*args, *extra]
    made = [value for arg in args for value in overrides_of(arg)]
    swept = [arg.partition("=")[0] for arg in args if "=" in arg]
    made = [value for value in made if value.partition("=")[0] not in swept]
    if "--replicas" in args:
        args[args.index("--replicas") + 1] = "2"
        made = [value for value in made if not value.startswith("replicas=")]
    if "--backend" in args:
        args[args.index("--backend") + 1] = "local"
    jobs = [] if words[2] == "analysis.figures" else ["--jobs", "1"]
    return [*args, *(word for value in made for word in ("--set", value)), *jobs, *extra]


def run(words: list[str], extra: list[str]) -> int:
    """Run ``python -m MODULE ARGS`` in this process; return its exit status."""
    assert words[:2] == ["python", "-m"], words
    module = importlib.import_module(words[2])
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{words[2]}.__main__")
    return int(module.main(small(words, extra)))


def anchors(text: str) -> set[str]:
    """Return GitHub's anchors of a document's headings."""
    found: dict[str, int] = {}
    made = set()
    for heading in re.findall(r"^#{1,6} (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        made.add(f"{slug}-{count}" if count else slug)
    return made


def links(text: str) -> list[str]:
    """Return the targets of a document's links and pictures, addresses of the web left out."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", bare) if "://" not in target]


def words_of(text: str) -> list[str]:
    """Return the words of three letters and more of a quoted output."""
    return re.findall(r"[^\W\d_]{3,}", text)


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command that documents may name."""
    for name in [*command_page.programs(), "analysis.figures", "analysis.notebooks"]:
        module = importlib.import_module(name)
        if hasattr(module, "parser"):
            yield module.parser()
