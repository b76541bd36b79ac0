"""Scenario files: YAML 1.2 (or JSON) to plain data, and the place of every key. Knows nothing about scenarios.

One idea joins files: any mapping may say ``extends: other.yaml``. The keys of the other file are its base, its own
keys win, mappings are merged key by key, everything else (lists too) is replaced whole. A mapping that names another
``kind`` than its base replaces the base. In fields that refer to files (``references``), ``model: v3.yaml`` is short
for ``model: {extends: v3.yaml}`` and replaces an inherited model whole.

Untrusted input: limits and refused constructs are those of `sim.syntax`; files named in a file must lie inside the tree
of the first file.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from sim import located
from sim.located import KeyPath, Mark, Problem, ScenarioError, dotted, nearest_file, short
from sim.syntax import (
    MAX_DEPTH,
    MAX_NODES,
    Convert,
    Node,
    bad_scalar,
    from_plain,
    parse_json,
    parse_yaml,
    read_text,
    to_plain,
)

__all__ = [
    "Document",
    "Mark",
    "Override",
    "Problem",
    "ScenarioError",
    "apply_overrides",
    "document",
    "dotted",
    "dump",
    "parse_key",
    "parse_override",
    "put",
    "read",
    "validate",
]

MAX_CHAIN = 20
M = TypeVar("M", bound=BaseModel)
_BARE = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[A-Za-z][\w./-]*( [\w./-]+)*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Document:
    """Plain data of a scenario with all references resolved.

    data: dict, list, str, int, float, bool and None only; not shared with other documents.
    marks: the mark of every key and list item by path, ``("policies", 2, "kind")``; ``()`` is the first file.
    """

    data: dict[str, Any]
    marks: dict[KeyPath, Mark]
    _tree: Node = field(repr=False)
    _library: _Library = field(repr=False)

    def problem(self, path: KeyPath, rule: str) -> Problem:
        """A `Problem` for checks made after validation, at the deepest key of ``path`` that the document has."""
        return located.problem(self.data, self.marks, path, rule)


def read(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    references: frozenset[str] | set[str] = frozenset(),
    convert: Convert | None = None,
    allow_outside: bool = False,
) -> Document:
    """Read a scenario file and the files it extends.

    root: folder that files named in a file may not leave (default: the folder of ``path``) unless ``allow_outside``.
    references: keys, at the top level and in the items of top-level lists, whose text names a file.
    convert: makes our keys of a referenced ``.json`` file: ``convert(data, path)``; its ValueError is reported.

    Raises ScenarioError with every problem found (after a syntax error the rest of that file is not read).
    """
    library = _Library(frozenset(references), convert, allow_outside)
    given = os.fspath(path)
    tree = library.load(given, None if root is None else os.fspath(root))
    return library.resolve(tree)


def document(
    data: dict[str, Any],
    *,
    name: str = "<data>",
    references: frozenset[str] | set[str] = frozenset(),
    convert: Convert | None = None,
) -> Document:
    """Make a `Document` of plain data, as if read from a file; its file names are relative to the current folder."""
    return _Library(frozenset(references), convert, False).resolve(from_plain(data, Mark(name)))


class Override(NamedTuple):
    """A value for one key. shown: where problems with it are said to be."""

    shown: str
    path: tuple[str, ...]
    value: Node


def shown_override(text: str) -> str:
    """Where problems with a ``--set`` are said to be."""
    return "--set " + (text if len(text) <= 80 else text[:77] + "...")


def parse_override(text: str) -> Override:
    """Read ``a.b.0.c=value``, whose value is YAML. Raises ScenarioError."""
    shown = shown_override(text)
    keys, equals, value = text.partition("=")
    if not equals:
        raise ScenarioError([Problem(shown, keys.strip(), "must be written key.key=value")])
    path = parse_key(keys, shown)
    mark = Mark(shown)
    try:
        return Override(shown, path, parse_yaml(value, mark) or Node(None, mark))
    except ScenarioError as error:
        raise ScenarioError([p if p.path else p._replace(path=dotted(path)) for p in error.problems]) from None


def parse_key(text: str, shown: str) -> tuple[str, ...]:
    """Read ``a.b.0.c``. Raises ScenarioError, located at ``shown``."""
    path = tuple(text.strip().split("."))
    if not all(path):
        raise ScenarioError([Problem(shown, dotted(path), "has an empty key")])
    if len(path) > MAX_DEPTH:
        raise ScenarioError([Problem(shown, dotted(path), f"is nested more than {MAX_DEPTH} levels deep")])
    return path


def put(document: Document, overrides: Sequence[Override]) -> Document:
    """Return the document with ``overrides`` applied in order.

    Missing keys are created, list items must exist. ``model.extends=other.yaml`` changes the base under the scenario's
    own keys. Raises ScenarioError with every bad override.
    """
    tree, library, problems = document._tree, document._library, []
    # A new base has to be in place before keys below it are looked up.
    for shown, path, value in sorted(overrides, key=lambda override: override.path[-1] != "extends"):
        try:
            tree = library.put(tree, path, value, ())
        except ScenarioError as error:
            for problem in error.problems:
                bare = problem.where == shown and not problem.path
                problems.append(problem._replace(path=dotted(path)) if bare else problem)
    if problems:
        raise ScenarioError(list(dict.fromkeys(problems)))
    return library.resolve(tree)


def apply_overrides(
    document: Document,
    overrides: Sequence[str],
    put: Callable[[Document, Sequence[Override]], Document] = put,
) -> Document:
    """As ``put``, of ``a.b.0.c=value`` texts. A file named here is the user's own word: relative to the current folder and
    allowed anywhere. Problems are located at ``--set a.b.0.c=value``, in the order of the texts."""
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            parsed.append(parse_override(text))
        except ScenarioError as error:
            problems += error.problems
    try:
        document = put(document, parsed)
    except ScenarioError as error:
        problems += error.problems
    if problems:
        order = {shown_override(text): i for i, text in enumerate(overrides)}
        problems.sort(key=lambda problem: order.get(problem.where, len(order)))
        raise ScenarioError(list(dict.fromkeys(problems)))
    return document


def validate(model_cls: type[M], document: Document) -> M:
    """Return the document as a ``model_cls``; raises ScenarioError with every problem (see `sim.located.validate`)."""
    return located.validate(model_cls, document.data, document.marks)


def dump(data: Any) -> str:
    """Block-style YAML of plain data, keys in their own order; reading it gives the same data back.

    Raises ValueError for numbers that are not finite.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    def quoted(value: Any) -> Any:
        if isinstance(value, dict):
            return {quoted(key): quoted(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [quoted(item) for item in value]
        if rule := bad_scalar(value):
            raise ValueError(f"{rule} [got {short(value)}]")
        # Every text that might be read as something else is quoted.
        return DoubleQuotedScalarString(value) if isinstance(value, str) and not _BARE.fullmatch(value) else value

    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = False
    yaml.width = 2**30
    yaml.representer.ignore_aliases = lambda _: True
    stream = io.StringIO()
    yaml.dump(quoted(data), stream)
    return stream.getvalue()


# --- joining files ---


@dataclass
class _Library:
    """The files of one scenario: who says what, and what may be opened."""

    references: frozenset[str]
    convert: Convert | None
    allow_outside: bool
    trees: dict[str, Node | ScenarioError] = field(default_factory=dict)  # by real path
    homes: dict[str, tuple[str, str]] = field(default_factory=dict)  # shown name: (folder as written, real root)
    first: str = ""

    def load(self, given: str, root: str | None) -> Node:
        """Read the first file; ``root`` as in `read`."""
        folder = os.path.dirname(given)
        try:
            self.first = os.path.realpath(given)
            home = (folder, os.path.realpath(folder if root is None else root))
        except (OSError, ValueError) as error:
            raise ScenarioError([Problem(_shown(given), "", f"is not a usable file name: {error}")]) from None
        tree = self._file(given, self.first, home, None)
        self.trees[self.first] = tree
        return tree

    def resolve(self, tree: Node) -> Document:
        marks: dict[KeyPath, Mark] = {}
        problems: list[Problem] = []

        def walk(node: Node, path: KeyPath, chain: tuple[str, ...]) -> Any:
            try:
                node, chain = self.flatten(node, path, chain)
            except ScenarioError as error:
                problems.extend(error.problems)
                node = Node(None, node.mark)
            marks[path] = node.mark
            if len(path) > MAX_DEPTH or len(marks) > MAX_NODES:
                what = f"{MAX_DEPTH} levels deep" if len(path) > MAX_DEPTH else f"{MAX_NODES} values in all"
                raise ScenarioError([*problems, Problem(str(node.mark), dotted(path), f"more than {what}")])
            if isinstance(node.value, dict):
                return {key: walk(child, (*path, key), chain) for key, child in node.value.items()}
            if isinstance(node.value, list):
                return [walk(child, (*path, index), chain) for index, child in enumerate(node.value)]
            return node.value

        data = walk(tree, (), (self.first,))
        if problems:
            raise ScenarioError(list(dict.fromkeys(problems)))
        return Document(data, marks, tree, self)

    def flatten(self, node: Node, path: KeyPath, chain: tuple[str, ...]) -> tuple[Node, tuple[str, ...]]:
        """``node`` with its own ``extends`` merged in (not those of its children), and the files met on the way."""
        node = self._unfold(node, path)
        if not isinstance(node.value, dict) or "extends" not in node.value:
            return node, chain
        own = {key: child for key, child in node.value.items() if key != "extends"}
        tree, real = self._follow(node.value["extends"], path, chain)
        base, chain = self.flatten(Node(tree.value, node.mark), path, (*chain, real))
        return Node(self._merge(base.value, own, path), node.mark), chain

    def put(self, node: Node, keys: tuple[str, ...], new: Node, path: KeyPath) -> Node:
        """``node`` with the value at ``keys`` replaced by ``new``; shares the rest."""
        if not keys:
            return new
        node = self._unfold(node, path)
        if len(keys) > 1:
            node, _ = self.flatten(node, path, ())
        key, rest = keys[0], keys[1:]
        if node.value is None:
            node = Node({}, new.mark)
        if isinstance(node.value, str) and rest == () and re.fullmatch("[a-z][a-z0-9_]*", node.value):
            node = Node({"kind": node}, node.mark)  # ``select: topk`` is short for ``select: {kind: topk}``
        if isinstance(node.value, dict):
            child = node.value.get(key, Node(None, new.mark))
            return Node({**node.value, key: self.put(child, rest, new, (*path, key))}, node.mark)
        where = (str(new.mark), dotted((*path, *keys)))
        if not isinstance(node.value, list):
            rule = f"{dotted(path) or 'the document'} is neither a mapping nor a list"
            raise ScenarioError([Problem(*where, rule, short(node.value))])
        if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(node.value):
            rule = f"{dotted(path)} is a list of {len(node.value)}: its items are "
            rule += f"0 to {len(node.value) - 1}" if node.value else "none"
            raise ScenarioError([Problem(*where, rule, short(key))])
        items = list(node.value)
        items[int(key)] = self.put(items[int(key)], rest, new, (*path, int(key)))
        return Node(items, node.mark)

    def _unfold(self, node: Node, path: KeyPath) -> Node:
        """``model: file`` as ``model: {extends: file}``."""
        place = len(path) == 1 or (len(path) == 3 and isinstance(path[1], int))
        if place and path[-1] in self.references and isinstance(node.value, str):
            return Node({"extends": node}, node.mark)
        return node

    def _merge(self, base: dict[str, Node], own: dict[str, Node], path: KeyPath) -> dict[str, Node]:
        merged = dict(base)
        for key, node in own.items():
            under = self._unfold(base[key], (*path, key)) if key in base else None
            if under is not None and isinstance(node.value, dict) and isinstance(under.value, dict):
                kinds = [kind.value for side in (under, node) if (kind := side.value.get("kind"))]
                if len(kinds) < 2 or kinds[0] == kinds[1]:
                    node = Node(self._merge(under.value, node.value, (*path, key)), node.mark)
            merged[key] = node
        return merged

    def _follow(self, name: Node, path: KeyPath, chain: tuple[str, ...]) -> tuple[Node, str]:
        """The tree of the file that ``name`` names and its real path."""

        def refuse(rule: str, hint: str = "") -> ScenarioError:
            return ScenarioError([Problem(str(name.mark), dotted(path) or "extends", rule, short(name.value), hint)])

        if not isinstance(name.value, str) or not name.value:
            raise refuse("must be the name of a file")
        trusted = name.mark.line == 0
        folder, root = ("", "") if trusted else self.homes[name.mark.file]
        given = os.path.join(folder, name.value)
        try:
            real = os.path.realpath(given)
        except (OSError, ValueError):
            raise refuse("is not a usable file name") from None
        if trusted:
            root = os.path.dirname(real)
        elif not self.allow_outside and real != root and not real.startswith(os.path.join(root, "")):
            raise refuse(f"leaves the folder {_shown(root)}: files named in a file must stay inside it")
        if real in chain:
            circle = [_shown(file) for file in (*chain[chain.index(real) :], real)]
            raise refuse(f"extends goes in a circle: {' -> '.join(circle)}")
        if len(chain) > MAX_CHAIN:
            raise refuse(f"more than {MAX_CHAIN} files extend each other")
        if real not in self.trees:
            if not os.path.exists(real):
                raise refuse("no such file", nearest_file(real))
            if not os.path.isfile(real):
                raise refuse("is not a file")
            try:
                self.trees[real] = self._file(given, real, (os.path.dirname(given), root), self.convert)
            except ScenarioError as error:
                self.trees[real] = error
        tree = self.trees[real]
        if isinstance(tree, ScenarioError):
            raise ScenarioError(tree.problems)
        return tree, real

    def _file(self, given: str, real: str, home: tuple[str, str], convert: Convert | None) -> Node:
        name = _shown(given)
        self.homes.setdefault(name, home)
        start = Mark(name, 1, 1)
        text = read_text(real, name)
        if real.endswith(".json"):
            return parse_json(text, start, real, convert)
        tree = parse_yaml(text, start)
        if tree is None:
            raise ScenarioError([Problem(str(start), "", "the file is empty")])
        if not isinstance(tree.value, dict):
            raise ScenarioError([Problem(str(start), "", "must be a mapping (key: value)", short(to_plain(tree)))])
        return tree


def _shown(path: str) -> str:
    """Relative to the current folder if below it, else as given; forward slashes."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):
        relative = path or "."
    inside = relative != ".." and not relative.startswith(".." + os.sep)
    return (relative if inside else os.path.normpath(path)).replace(os.sep, "/")
