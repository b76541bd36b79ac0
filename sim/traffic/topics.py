"""A tree of topics: domains, tasks, languages. Siblings share their parents' expert popularity, so they are close.

Real domains are hierarchical (mathematics near physics, both far from law: routing_statistics.md section 6, measured on
gpt-oss-20b), and most of the load imbalance of a narrow stream is its topic (section 1).
"""

from __future__ import annotations

import itertools
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Topic(BaseModel):
    """A topic, or a group of topics if it has ``children``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    weight: float = Field(default=1.0, gt=0)
    """Share of sequences among the siblings; any positive numbers, normalised within the siblings."""
    popularity_sd: float = Field(default=0.3, ge=0)
    """Standard deviation over experts of this node's own preference vector, in units of a token's own spread.
    About 0.3 for a narrow domain, 0.1 for a broad one. A leaf adds the vectors of all nodes on its path."""
    children: tuple[Topic, ...] = ()

    @model_validator(mode="after")
    def _siblings_differ(self) -> Self:
        check_siblings(self.children)
        return self


def check_siblings(topics: tuple[Topic, ...]) -> None:
    """Raise ValueError if two of ``topics`` share a name."""
    seen: set[str] = set()
    for topic in topics:
        if topic.name in seen:
            raise ValueError(f"two topics are called {topic.name!r}")
        seen.add(topic.name)


class Leaf(BaseModel):
    """A leaf of the tree: its name, probability, and the nodes (path of names, popularity_sd) from root to leaf."""

    model_config = ConfigDict(frozen=True)

    name: str
    probability: float
    path: tuple[tuple[str, float], ...]


def leaves(topics: tuple[Topic, ...], probability: float = 1.0, path: tuple[tuple[str, float], ...] = ()) -> list[Leaf]:
    """Return the leaves of a forest of ``topics`` in the order written; probabilities sum to ``probability``.

    A node's path is its names joined by "/", so renaming or adding a topic leaves the vectors of all others unchanged.
    """
    found: list[Leaf] = []
    total = sum(topic.weight for topic in topics)
    for topic in topics:
        share = probability * topic.weight / total
        full = f"{path[-1][0]}/{topic.name}" if path else topic.name
        here = (*path, (full, topic.popularity_sd))
        if topic.children:
            found += leaves(topic.children, share, here)
        else:
            found.append(Leaf(name=topic.name, probability=share, path=here))
    return found


class Shift(BaseModel):
    """A change of the mixture: a switch (fine-tuning on other data) or, with ``over_steps``, a linear drift."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: int = Field(ge=0)
    """Train step at which the change begins."""
    over_steps: int = Field(default=0, ge=0)
    """Steps until it is complete; 0 = at once."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """Leaf name -> weight after the change; leaves not named get 0."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if not sum(self.weights.values()) > 0:
            raise ValueError("weights must have a positive sum")
        return self


def mixture(found: list[Leaf], shifts: tuple[Shift, ...], step: int | None) -> list[float]:
    """Return the leaf probabilities at train ``step`` (None: before any shift); shifts apply in the order of steps."""
    now = [leaf.probability for leaf in found]
    for shift in sorted(shifts, key=lambda shift: shift.step):
        if step is None or step < shift.step:
            break
        done = min(1.0, (step - shift.step) / shift.over_steps) if shift.over_steps else 1.0
        total = sum(shift.weights.values())
        after = [shift.weights.get(leaf.name, 0.0) / total for leaf in found]
        now = [(1 - done) * p + done * q for p, q in zip(now, after, strict=True)]
    return now


def cumulative(probabilities: list[float]) -> list[float]:
    """Return the running sum of ``probabilities``, divided by its end: exactly 1 from the last possible entry on."""
    sums = list(itertools.accumulate(probabilities))
    return [value / sums[-1] for value in sums]
