"""The registration rule: a new file or class is usable in a scenario, listed and in the schema, with no other edit."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

import sim.cost
import sim.gating.select
import sim.placement
import sim.traffic
from sim.catalogue import FAMILIES, listing, schema
from sim.gating.select import Candidates, Select
from sim.loading import load
from sim.placement import Observed, Placement
from sim.plugin import Choice, Plugin, make, members
from sim.run import main
from sim.slots import Slots
from sim.study import run
from sim.tokens import I16
from sim.yamlfile import ScenarioError

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
SMALL = ["replicas=1", "steps.count=1", "steps.warmup.steps=0", "traffic.tokens_per_rank=32"]

SELECT = '''
"""Experts side by side, starting at the best one."""
from typing import Literal
import numpy as np
from sim.gating.select import Candidates, Select
from sim.tokens import I16

class Neighbours(Select):
    """The best expert and those next to it."""

    kind: Literal["neighbours"] = "neighbours"
    stride: int = 1

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        best = c.kernels.topk(c.scores, c.scale, c.shift, 1).astype(int)
        return ((best + self.stride * np.arange(c.k)) % c.scores.shape[1]).astype(np.int16)
'''
PLACEMENT = '''
"""Experts in reverse."""
from typing import Literal
import numpy as np
from sim.placement import Observed, Placement
from sim.slots import Slots
from sim.tokens import I32

class Reversed(Placement):
    """Slot s holds expert E - 1 - s."""

    kind: Literal["reversed"] = "reversed"

    def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> I32:
        return np.arange(slots.n_routed_experts, dtype=np.int32)[None, ::-1].copy()
'''
TRAFFIC = '''
"""Every token wants the first experts most."""
from typing import Literal
import numpy as np
from sim.tokens import Tokens
from sim.traffic import Batch, Source, Traffic, TrafficShape

class Descending(Traffic):
    """Logits fall with the expert's number."""

    kind: Literal["descending"] = "descending"
    slope: float = 0.1

    @property
    def provides(self) -> Literal["logits", "ids"]:
        return "logits"

    @property
    def topics(self) -> tuple[str, ...]:
        return ("all",)

    def start(self, shape: TrafficShape, seed: int, replica: int) -> Source:
        return _Source(-self.slope * np.arange(shape.n_routed_experts, dtype=np.float32))

class _Source(Source):
    def __init__(self, row):
        self.row = row

    def batch(self, phase: str, step: int, *, n_ranks: int, tokens_per_rank: int) -> Batch:
        return _Batch(np.tile(self.row, (tokens_per_rank, 1)))

class _Batch(Batch):
    def __init__(self, logits):
        self.logits = logits

    def tokens(self, layer: int, rank: int) -> Tokens:
        return Tokens(rank, self.logits.astype(np.float32), np.zeros(len(self.logits), np.int32))
'''
COST = '''
"""Data arrives at once."""
from typing import Literal
import numpy as np
from sim.cost import CommunicationCost, checked_tokens

class Free(CommunicationCost):
    """No bytes take any time."""

    kind: Literal["free"] = "free"

    def pair_times_s(
        self, network, *, rank_tokens, node_tokens, bytes_per_token, mode, direction="dispatch", slowdown=1.0
    ):
        tokens, _ = checked_tokens(network, rank_tokens, node_tokens)
        reaches = (tokens > 0) & ~np.eye(tokens.shape[-1], dtype=bool)
        return np.zeros_like(tokens), reaches
'''
FILES: dict[str, tuple[Any, str]] = {
    "neighbours": (sim.gating.select, SELECT),
    "reversed": (sim.placement, PLACEMENT),
    "descending": (sim.traffic, TRAFFIC),
    "free": (sim.cost, COST),
}
WHERE = {
    "neighbours": "policies[].select", "reversed": "policies[].placement", "descending": "traffic",
    "free": "cost.communication",
}  # fmt: skip


def _kinds() -> dict[str, list[str]]:
    return {where: list(members(base)) for where, base in FAMILIES.items()}


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """Whatever a test defines is forgotten after it: the families are as they were."""
    before = _kinds()
    yield
    gc.collect()  # a family knows its members by weak references only
    assert _kinds() == before


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four new files, each as if saved into the package of its family."""
    names = []
    for kind, (package, text) in FILES.items():
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        (folder / f"{kind}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        names.append((package, f"{package.__name__}.{kind}", kind))
    importlib.invalidate_caches()
    yield
    for package, name, kind in names:
        sys.modules.pop(name, None)
        if hasattr(package, kind):
            delattr(package, kind)
    gc.collect()


@pytest.mark.usefixtures("dropped")
def test_a_dropped_file_joins_the_main_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario names the four new kinds, by text or with their own settings, and runs."""
    overrides = [
        *SMALL,
        "traffic={kind: descending, tokens_per_rank: 32, slope: 0.5}",
        "cost.communication=free",
        "policies=[{name: a, select: topk}, {name: b, select: {kind: neighbours, stride: 8}, placement: reversed}]",
    ]
    result = run(TINY, overrides=overrides)
    experts = result.experts
    loads = experts[experts.layer == experts.layer.min()].pivot(index="expert", columns="policy", values="tokens")
    assert loads.a[loads.a > 0].index.tolist() == [0, 1, 2, 3]
    assert loads.b[loads.b > 0].index.tolist() == [0, 8, 16, 24]
    hosts = experts[experts.policy == "b"].drop_duplicates("expert").set_index("expert").device
    assert hosts[0] == 7 and hosts[31] == 0
    assert (result.steps.exposed_communication_s == 0).all()
    assert main([str(TINY), "--dry-run", *(x for o in overrides for x in ("--set", o))]) == 0
    assert "neighbours" in capsys.readouterr().out


@pytest.mark.usefixtures("dropped")
def test_a_dropped_file_is_listed_and_in_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, where in WHERE.items():
        assert kind in members(FAMILIES[where])
    assert main(["--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for kind, where in WHERE.items():
        assert [where, kind] in [line[:2] for line in lines]
    assert ["policies[].select", "neighbours", "The", "best", "expert", "and", "those", "next", "to", "it."] in lines
    assert main(["--schema"]) == 0
    text = capsys.readouterr().out
    json.loads(text)
    assert all(f'"{kind}"' in text for kind in WHERE) and '"stride"' in text


def test_without_the_files_the_kinds_are_unknown() -> None:
    """Negative control, and what the user is told."""
    text = json.dumps(schema())
    assert not any(f'"{kind}"' in text for kind in WHERE)
    with pytest.raises(ScenarioError) as error:
        load(TINY, ["policies.0.select=group_limted"])
    message = str(error.value)
    assert "must be one of " + ", ".join(members(Select)) in message
    assert "policies.0.select" in message and "did you mean group_limited?" in message
    with pytest.raises(ScenarioError, match="descending"):
        load(TINY, ["traffic={kind: descending}"])


@pytest.mark.usefixtures("dropped")
def test_errors_inside_a_new_plugin_have_paths() -> None:
    with pytest.raises(ScenarioError) as error:
        load(TINY, ["policies.0.select={kind: neighbours, stride: wide}"])
    assert "policies.0.select.stride" in str(error.value)
    with pytest.raises(ScenarioError) as error:
        load(TINY, ["policies.0.select={kind: neighbours, strid: 2}"])
    assert "strid" in str(error.value) and "stride" in str(error.value)


def test_a_class_in_a_notebook_joins_and_can_be_run_again() -> None:
    def cell(width: int) -> type[Select]:
        class First(Select):
            """Always the first experts."""

            kind: Literal["first"] = "first"
            offset: int = width

            def select(self, candidates: Candidates) -> I16:
                row = (self.offset + np.arange(candidates.k)).astype(np.int16)
                return np.tile(row, (len(candidates.scores), 1))

        return First

    first = cell(0)
    assert members(Select)["first"] is first
    again = cell(2)  # the same cell, edited and run again: the later one counts
    assert members(Select)["first"] is again
    result = run(TINY, overrides=[*SMALL, "policies=[{name: a, select: first}]"])
    assert sorted(set(result.experts[result.experts.tokens > 0].expert)) == [2, 3, 4, 5]
    assert "first" in listing() and '"first"' in json.dumps(schema())


def test_two_files_with_one_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "also_linear.py").write_text(PLACEMENT.replace('"reversed"', '"linear"'))
    monkeypatch.setattr(sim.placement, "__path__", [*sim.placement.__path__, str(tmp_path)])
    try:
        with pytest.raises(
            TypeError, match=r"sim\.placement\..* and sim\.placement\..* both define Placement kind 'linear'"
        ):
            members(Placement)
    finally:
        sys.modules.pop("sim.placement.also_linear", None)
        if hasattr(sim.placement, "also_linear"):
            delattr(sim.placement, "also_linear")


def test_abstract_and_nameless_classes_do_not_join() -> None:
    class Half(Placement):
        kind: Literal["half"] = "half"

    class Nameless(Half):
        kind: str = "nameless"  # type: ignore[assignment]

        def place(self, slots: Slots, observed: Observed, rng: np.random.Generator) -> Any:
            return np.arange(slots.n_routed_experts)

    assert not {"half", "nameless"} & set(members(Placement))
    with pytest.raises(TypeError, match="abstract"):
        Half()
    del Half, Nameless


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lineer", r"unknown placement kind \[got 'lineer'\] \(did you mean linear\?\)"),
        ({"kind": 3}, r"unknown placement kind \[got 3\]"),
        ({}, "a placement needs a kind: .*linear"),
        (7, r"a placement is a mapping with a kind \(.*linear.*\)"),
        ({"kind": "linear", "kin": 1}, "Extra inputs"),
    ],
)
def test_messages(value: object, message: str) -> None:
    class Holder(BaseModel):
        placement: Annotated[Placement, Choice(Placement)]

    with pytest.raises(ValidationError, match=message):
        Holder.model_validate({"placement": value})
    assert Holder.model_validate({"placement": "linear"}).placement == make(Placement, "linear")


@pytest.mark.parametrize("where", FAMILIES)
def test_every_member_of_every_family(where: str) -> None:
    """Named as it says, documented in one line, frozen, refusing unknown keys, and surviving a round trip."""
    base = FAMILIES[where]
    found = members(base)
    assert found and list(found) == sorted(found)
    for kind, cls in found.items():
        assert issubclass(cls, Plugin) and cls.model_fields["kind"].default == kind
        assert (cls.__doc__ or "").split("\n")[0].strip()
        assert any(line.split()[:2] == [where, kind] for line in listing().splitlines())
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        if required:
            continue
        plugin = make(base, kind)
        assert cls.model_validate(plugin.model_dump(mode="json")) == plugin
        with pytest.raises(ValidationError):
            cls.model_validate({"kind": kind, "no_such_key": 1})
        with pytest.raises(ValidationError):
            plugin.kind = "other"  # frozen
