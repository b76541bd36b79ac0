"""The text of one file, YAML 1.2 or JSON, as a tree of values that know where they stand.

Built on ruamel.yaml's pure-Python event stream, which never recurses, so every limit is met before anything large is
made. Scalars follow the YAML 1.2 core schema to the letter: ``1e-3`` is a number; ``off``, ``1:30``, ``1_000`` and
``2026-01-01`` are text. Refused: tags other than the core ones, merge keys, directives, keys that are not text,
duplicate keys, numbers that are not finite, integers beyond 64 bits, several documents.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sim.located import KeyPath, Mark, Problem, ScenarioError, dotted, nearest_file, short

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000

Convert = Callable[[dict[str, Any], pathlib.Path], dict[str, Any]]


class Node(NamedTuple):
    """A value with the mark of its key or item. Mappings hold ``dict[str, Node]``, lists ``list[Node]``."""

    value: Any
    mark: Mark


def read_text(real: str, name: str) -> str:
    """Read a file; raises ScenarioError for one that is missing, too large, binary, or indented with tabs.

    real: the path to open. name: what to call it in problems.
    """

    def refuse(rule: str, before: bytes | None = None) -> ScenarioError:
        if before is None:
            return ScenarioError([Problem(name, "", rule)])
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        return ScenarioError([Problem(str(Mark(name, line, column)), "", rule)])

    try:
        if not os.path.exists(real):
            raise ScenarioError([Problem(name, "", "no such file", hint=nearest_file(real))])
        if not os.path.isfile(real):
            raise refuse("is a folder, not a file" if os.path.isdir(real) else "is not a regular file")
        with open(real, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES} bytes")
    if b"\0" in raw:
        raise refuse("holds a NUL byte: not a text file", raw[: raw.index(b"\0")])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse("is not UTF-8 text", raw[: error.start]) from None
    tab = None if real.endswith(".json") else re.search(r"^ *\t(?=[ \t]*[^\s#])", text, re.MULTILINE)
    if tab:
        raise refuse("a tab in the indentation: use spaces", text[: tab.end() - 1].encode())
    return text


def parse_yaml(text: str, start: Mark) -> Node | None:
    """The tree of a YAML text that begins at ``start``, or None if it holds nothing.

    With ``start.line == 0`` every node gets the mark ``start`` itself. Raises ScenarioError with every problem that
    can be seen before the text stops making sense.
    """
    return _Builder(text, start).build()


def from_plain(value: Any, mark: Mark, lines: dict[str, Mark] | None = None) -> Node:
    """A tree of plain data in which every node stands at ``mark``, or at the place ``lines`` knows for its key."""
    places = lines or {}
    if isinstance(value, dict):
        items = ((str(key), item) for key, item in value.items())
        return Node({key: from_plain(item, places.get(key, mark), lines) for key, item in items}, mark)
    if isinstance(value, list | tuple):
        return Node([from_plain(item, mark, lines) for item in value], mark)
    return Node(value, mark)


def to_plain(node: Node) -> Any:
    """The data of a tree without the marks."""
    if isinstance(node.value, dict):
        return {key: to_plain(child) for key, child in node.value.items()}
    return [to_plain(child) for child in node.value] if isinstance(node.value, list) else node.value


# --- JSON ---


def parse_json(text: str, start: Mark, real: str, convert: Convert | None) -> Node:
    """The tree of a JSON object, after ``convert`` (if given) has made our keys of it.

    Keys that occur once in the text get their line; others get ``start``. Raises ScenarioError.
    """

    def refuse(rule: str, mark: Mark = start, got: str = "") -> ScenarioError:
        return ScenarioError([Problem(str(mark), "", rule, got)])

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise refuse("duplicate key", got=short(key))
            seen[key] = value
        return seen

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise refuse(f"not valid JSON: {error.msg}", Mark(start.file, error.lineno, error.colno)) from None
    except RecursionError:
        raise refuse(f"is nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:  # an integer of thousands of digits
        raise refuse("holds a number with too many digits") from None
    if not isinstance(data, dict):
        raise refuse("must be a JSON object", got=short(data))
    if convert is not None:
        try:
            data = convert(data, pathlib.Path(real))
        except RecursionError:
            raise refuse(f"is nested more than {MAX_DEPTH} levels deep") from None
        except ValueError as error:
            raise refuse(str(error)) from None
    ends = [-1, *(found.start() for found in re.finditer("\n", text))]
    marks: dict[str, Mark | None] = {}
    for found in re.finditer(r'"([^"\\]+)"\s*:', text):
        line = bisect.bisect_left(ends, found.start())
        place = Mark(start.file, line, found.start() - ends[line - 1])
        marks[found[1]] = None if found[1] in marks else place
    try:
        tree = from_plain(data, start, {key: mark for key, mark in marks.items() if mark})
    except RecursionError:
        raise refuse(f"is nested more than {MAX_DEPTH} levels deep") from None
    problems: list[Problem] = []
    _check(tree, (), problems)
    if problems:
        raise ScenarioError(problems)
    return tree


def _check(node: Node, path: KeyPath, problems: list[Problem]) -> None:
    if isinstance(node.value, dict | list):
        items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        for part, child in items:
            _check(child, (*path, part), problems)
    elif rule := bad_scalar(node.value):
        problems.append(Problem(str(node.mark), dotted(path), rule, short(node.value)))


def bad_scalar(value: Any) -> str:
    """What is wrong with a scalar of any file, or ``""``."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "must fit 64 bits"
    return "is not valid Unicode text" if isinstance(value, str) and _SURROGATE.search(value) else ""


# --- YAML ---

_SURROGATE = re.compile("[\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_CORE = {"str": str, "int": int, "float": float, "bool": bool, "null": type(None)}
_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"([-+]?[0-9]+)|0o([0-7]+)|0x([0-9a-fA-F]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# So many brackets without one that closes; ruamel would look a thousand characters ahead at each of them.
_NEST = re.compile(r"(?:[\[{][^\[\]{}'\"#]*)" + f"{{{MAX_DEPTH + 2}}}")


def _core(text: str) -> Any:
    """The value of an unquoted scalar in the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    if found := _BOOL.fullmatch(text):
        return bool(found[1])
    if found := _INT.fullmatch(text):
        digits, base = next((part, base) for part, base in zip(found.groups(), (10, 8, 16), strict=True) if part)
        return int(digits, base) if len(digits) < 100 else 2**100  # refused below as too large
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return math.nan
    return text


class _Builder:
    """Makes one tree of a text. Problems that leave the structure clear are gathered, others end the reading."""

    def __init__(self, text: str, start: Mark) -> None:
        self.text, self.start, self.last = text, start, start
        self.problems: list[Problem] = []
        self.anchors: dict[str, tuple[Any, int, int] | None] = {}  # value, nodes, levels; None while being read
        self.nodes = self.deepest = 0
        self.events: Iterator[Any] = iter(())

    def build(self) -> Node | None:
        from ruamel.yaml import YAML

        if nest := _NEST.search(self.text):
            self._stop(self._index(nest.start()), (), f"is nested more than {MAX_DEPTH} levels deep")
        self.events = iter(YAML(typ="safe", pure=True).parse(self.text))
        tree: Node | None = None
        documents = 0
        while (name := type(event := self._next()).__name__) != "StreamEndEvent":
            if name == "DocumentStartEvent":
                documents += 1
                if documents > 1:
                    self._stop(self.last, (), "a second document (---) in one file")
                if event.version or event.tags:
                    self._stop(self.last, (), "directives (%YAML, %TAG) are not supported")
                tree = self._node(self._next(), (), self.start)
        if self.problems:
            raise ScenarioError(self.problems)
        return None if tree is None or tree.value is None else tree

    def _mark(self, line: int, column: int) -> Mark:
        return Mark(self.start.file, line + 1, column + 1) if self.start.line else self.start

    def _index(self, position: int) -> Mark:
        before = self.text[:position]
        return self._mark(before.count("\n"), len(before) - before.rfind("\n") - 1)

    def _say(self, mark: Mark, path: KeyPath, rule: str, got: str = "") -> None:
        self.problems.append(Problem(str(mark), dotted(path), rule, got[:60]))

    def _stop(self, mark: Mark, path: KeyPath, rule: str, got: str = "") -> None:
        self._say(mark, path, rule, got)
        raise ScenarioError(self.problems)

    def _next(self) -> Any:
        from ruamel.yaml.error import MarkedYAMLError
        from ruamel.yaml.reader import ReaderError

        try:
            event = next(self.events)
        except MarkedYAMLError as error:
            place = error.problem_mark or error.context_mark
            mark = self._mark(place.line, place.column) if place else self.last
            begun = error.context_mark.line + 1 if error.context_mark and self.start.line else 0
            self._stop(mark, (), _reworded(error.problem or error.context or "", begun))
        except ReaderError as error:
            self._stop(self._index(error.position), (), f"the character U+{ord_of(error.character):04X} is not allowed")
        except Exception as error:  # ruamel lets OverflowError and others escape on odd text
            self._stop(self.last, (), f"not valid YAML ({type(error).__name__}: {error})")
        self.last = self._mark(event.start_mark.line, event.start_mark.column)
        return event

    def _node(self, event: Any, path: KeyPath, mark: Mark | None = None) -> Node:
        """The node that ``event`` begins; its mark is that of the event unless it has a key."""
        here = self.last
        mark = mark or here
        if len(path) > MAX_DEPTH:
            self._stop(here, (), f"is nested more than {MAX_DEPTH} levels deep")
        self.nodes += 1
        self.deepest = max(self.deepest, len(path))
        kind, anchor = type(event).__name__, event.anchor
        if kind == "AliasEvent":
            return Node(self._alias(anchor, path, here), mark)
        nodes, deepest, self.deepest = self.nodes, self.deepest, len(path)
        if anchor:
            self.anchors[anchor] = None
        if kind == "ScalarEvent":
            value = self._scalar(event, path, here)
        else:
            want = "seq" if kind == "SequenceStartEvent" else "map"
            if event.ctag is not None and str(event.ctag) != _TAG + want:
                self._say(here, path, "tags are not supported", str(event.ctag))
            value = self._list(path) if want == "seq" else self._dict(path)
        if self.nodes > MAX_NODES:
            self._stop(here, path, f"more than {MAX_NODES} values in all")
        if anchor:
            self.anchors[anchor] = (value, self.nodes - nodes, self.deepest - len(path))
        self.deepest = max(deepest, self.deepest)
        return Node(value, mark)

    def _alias(self, anchor: str, path: KeyPath, here: Mark) -> Any:
        if self.anchors.get(anchor) is None:
            wrong = "inside its own anchor" if anchor in self.anchors else "without an anchor before it"
            self._stop(here, path, f"an alias {wrong}", f"*{anchor}")
        value, nodes, levels = self.anchors[anchor] or (None, 0, 0)
        self.nodes += nodes
        self.deepest = max(self.deepest, len(path) + levels)
        if self.nodes > MAX_NODES:
            self._stop(here, path, f"aliases expand to more than {MAX_NODES} values")
        if self.deepest > MAX_DEPTH:
            self._stop(here, (), f"is nested more than {MAX_DEPTH} levels deep")
        return value

    def _scalar(self, event: Any, path: KeyPath, here: Mark) -> Any:
        text: str = event.value
        value = _core(text) if event.implicit[0] else text
        if event.ctag is not None:
            tag = str(event.ctag)
            typed = _CORE.get(tag.removeprefix(_TAG)) if tag.startswith(_TAG) else None
            if typed is None:
                self._say(here, path, "tags are not supported", tag)
                return text
            value = text if typed is str else _core(text)
            if typed is float and type(value) is int:
                value = float(value)
            if type(value) is not typed:
                self._say(here, path, f"is not what its tag {tag.removeprefix(_TAG)} says", short(text))
        if rule := bad_scalar(value):
            self._say(here, path, rule, short(text) if isinstance(value, str) else text[:60])
        return value

    def _list(self, path: KeyPath) -> list[Node]:
        items: list[Node] = []
        while type(event := self._next()).__name__ != "SequenceEndEvent":
            items.append(self._node(event, (*path, len(items))))
        return items

    def _dict(self, path: KeyPath) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while type(event := self._next()).__name__ != "MappingEndEvent":
            here = self.last
            kind = type(event).__name__
            if kind in ("SequenceStartEvent", "MappingStartEvent"):
                self._stop(here, path, "keys must be text, not lists or mappings")
            plain = kind == "ScalarEvent" and event.implicit[0]
            key = to_plain(self._node(event, path, here))
            self.nodes -= 1  # a key and its value are one node
            if plain and event.value == "<<":
                self._say(here, path, "merge keys (<<) are not supported: use extends")
            elif not isinstance(key, str):
                self._say(here, path, "keys must be text: quote this one", short(key))
            elif key in found:
                line = found[key].mark.line
                self._say(here, (*path, key), f"duplicate key, first at line {line}" if line else "duplicate key")
            value = self._node(self._next(), (*path, key if isinstance(key, str) else str(key)[:60]), here)
            if isinstance(key, str):
                found.setdefault(key, value)
        return found


def ord_of(character: Any) -> int:
    """The code point of what ruamel calls a character: text, bytes or already a number."""
    return character if isinstance(character, int) else ord(character)


_WORDS = (
    ("mapping values are not allowed here", "a ':' where none can stand: check the indentation, or quote the text"),
    ("sequence entries are not allowed here", "a '- ' where none can stand: check the indentation"),
    ("could not find expected ':'", "a key without ':'"),
    ("expected <block end>", "the indentation fits no line above, or the text before needs quotes"),
    ("found unexpected end of stream", "the text ends inside quotes"),
    ("that cannot start any token", "cannot start a value: quote the text"),
)


def _reworded(problem: str, begun: int) -> str:
    for theirs, ours in _WORDS:
        if theirs in problem:
            character = re.search(r"found character ('.*?'|\".*?\")", problem)
            problem = f"{character[1]} {ours}" if character and "token" in theirs else ours
            break
    since = f" (begun at line {begun})" if begun else ""
    return f"not valid YAML: {' '.join(problem.split())}{since}"
