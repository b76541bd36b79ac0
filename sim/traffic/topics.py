"""A tree of topics: domains, tasks, languages. Siblings share their parents' expert popularity, so they are close.

Real domains are hierarchical (mathematics near physics, both far from law: routing_statistics.md section 6, measured on
gpt-oss-20b), and most of the load imbalance of a narrow stream is its topic (section 1). A sequence draws a leaf; the
phases of a leaf (think, then answer) are the topics that its tokens have. How weights change is `mixture`'s business.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sim.kernels.elementary import power

MAX_LEAVES = 4096


class Phase(BaseModel):
    """A stretch of every sequence of a leaf, such as think or answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    """Such as think or answer."""
    share: float = Field(default=1.0, gt=0, le=1e9)
    """Part of the sequence, in proportion to the other phases' shares."""
    popularity_sd: float = Field(default=0.55, ge=0, le=10)
    """Standard deviation over experts of the phase's own preference vector, which all leaves with a phase of this name
    share. The default gives about the distance between gpt-oss-20b's load vectors while thinking and answering on one
    MMLU subject, Jensen-Shannon .21 bits (two subjects differ by .11 while thinking, by .05 while answering)."""


class Topic(BaseModel):
    """A topic, or a group of topics if it has ``children`` or a ``count``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    """Of the topic; unique among siblings."""
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """Share of sequences among the siblings; any positive numbers, normalised within the siblings."""
    popularity_sd: float = Field(default=0.3, ge=0, le=10)
    """Standard deviation over experts of this node's own preference vector, in units of a token's own spread.
    About 0.3 for a narrow domain, 0.1 for a broad one. A leaf adds the vectors of all nodes on its path."""
    modality: str | None = Field(default=None, min_length=1)
    """Text, image, ...; null = the parent's, ``text`` at the root."""
    count: int | None = Field(default=None, gt=0, le=MAX_LEAVES)
    """Stand for this many topics ``name-001``, ``name-002``, ... (the languages of a corpus), which share ``weight``
    and have a vector of standard deviation ``popularity_sd`` each and none in common (put them below a parent)."""
    zipf: float = Field(default=1.0, ge=0, le=4)
    """With ``count``: the weight of the n-th is n^-zipf; 0 = equal."""
    phases: tuple[Phase, ...] = ()
    """Topics ``name/phase`` that the tokens of a sequence go through, in this order; leaves only."""
    children: tuple[Topic, ...] = ()
    """Topics of the group."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        check_siblings(self.children)
        if self.children and (self.phases or self.count):
            raise ValueError(f"{self.name}: {'phases' if self.phases else 'count'} is for topics without children")
        names = [phase.name for phase in self.phases]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{self.name}: two phases are called {twice!r}")
        return self


def check_siblings(topics: tuple[Topic, ...]) -> None:
    """Raise ValueError if two of ``topics`` share a name."""
    seen: set[str] = set()
    for topic in topics:
        if topic.name in seen:
            raise ValueError(f"two topics are called {topic.name!r}")
        seen.add(topic.name)


class TokenTopic(NamedTuple):
    """What `Tokens.topic` indexes: a leaf, or a phase of one, with the (path of names, popularity_sd) it adds up."""

    name: str
    modality: str
    path: tuple[tuple[str, float], ...]


class Leaf(NamedTuple):
    """What a sequence draws: a leaf of the tree, its probability and the groups it is in (outermost first).

    topics: one per phase, or the leaf itself. ends: where each ends, as a share of the sequence; the last is 1.
    """

    name: str
    probability: float
    groups: tuple[str, ...]
    topics: tuple[TokenTopic, ...]
    ends: tuple[float, ...]


def leaves(topics: tuple[Topic, ...]) -> list[Leaf]:
    """Return the leaves of a forest of ``topics`` in the order written; probabilities sum to 1.

    A node's path is its names joined by "/", so renaming or adding a topic leaves the vectors of all others unchanged.
    """
    return list(_leaves(topics, 1.0, (), (), "text"))


def _leaves(
    topics: tuple[Topic, ...],
    probability: float,
    path: tuple[tuple[str, float], ...],
    groups: tuple[str, ...],
    modality: str,
) -> Iterator[Leaf]:
    total = sum(topic.weight for topic in topics)
    for topic in topics:
        share = probability * topic.weight / total
        own = topic.modality or modality
        prefix = f"{path[-1][0]}/" if path else ""
        if topic.children:
            here = (*path, (prefix + topic.name, topic.popularity_sd))
            yield from _leaves(topic.children, share, here, (*groups, topic.name), own)
        elif topic.count is None:
            here = (*path, (prefix + topic.name, topic.popularity_sd))
            yield _leaf(topic, topic.name, share, here, groups, own)
        else:
            weights = power(np.arange(1.0, topic.count + 1.0), -topic.zipf)
            weights /= np.cumsum(weights)[-1]
            for i, weight in enumerate(weights.tolist(), start=1):
                name = f"{topic.name}-{i:03d}"
                here = (*path, (prefix + name, topic.popularity_sd))
                yield _leaf(topic, name, share * weight, here, (*groups, topic.name), own)


def _leaf(
    topic: Topic,
    name: str,
    probability: float,
    path: tuple[tuple[str, float], ...],
    groups: tuple[str, ...],
    modality: str,
) -> Leaf:
    if not topic.phases:
        return Leaf(name, probability, groups, (TokenTopic(name, modality, path),), (1.0,))
    parts = tuple(
        # Not a path of names: one vector for all leaves with such a phase.
        TokenTopic(f"{name}/{phase.name}", modality, (*path, (f"phase {phase.name}", phase.popularity_sd)))
        for phase in topic.phases
    )
    return Leaf(name, probability, groups, parts, tuple(cumulative([phase.share for phase in topic.phases])))


def check_tree(topics: tuple[Topic, ...]) -> None:
    """Raise ValueError if names are not unique, a phase has two spreads, or there are too many leaves."""
    check_siblings(topics)
    n_leaves = sum(_count(topics))
    if n_leaves > MAX_LEAVES:
        raise ValueError(f"topic_tree: expected at most {MAX_LEAVES} leaves, found {n_leaves}")
    found = leaves(topics)
    for names in ([leaf.name for leaf in found], [topic.name for leaf in found for topic in leaf.topics]):
        twice = next((name for name, n in Counter(names).items() if n > 1), None)
        if twice is not None:
            raise ValueError(f"topic_tree: two leaves are called {twice!r}")
    spreads: dict[str, float] = {}
    for name, spread in (node for leaf in found for topic in leaf.topics for node in topic.path):
        if spreads.setdefault(name, spread) != spread:
            raise ValueError(f"topic_tree: {name} has popularity_sd {spreads[name]} and {spread}; one vector has one")


def _count(topics: Iterable[Topic]) -> Iterator[int]:
    for topic in topics:
        yield from _count(topic.children) if topic.children else (topic.count or 1,)


def cumulative(probabilities: list[float]) -> list[float]:
    """Return the running sum of ``probabilities``, divided by its end: exactly 1 from the last possible entry on."""
    sums = list(itertools.accumulate(probabilities))
    return [value / sums[-1] for value in sums]
