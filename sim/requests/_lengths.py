"""Distributions of token counts: a number, or ``{kind: fixed | uniform | lognormal | quantiles, ...}``.

Lengths are drawn by inverse transform, so that one uniform per request gives longer requests under a longer law.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from scipy.special import ndtri

from sim.kernels.elementary import exp, log
from sim.plugin import Choice, Plugin
from sim.tokens import F64, I64

MAX_TOKENS = 2**24
_GRID = 2**14
_CHUNK = 2**16  # the steps of exp and log then stay in cache
_Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


class Lengths(Plugin):
    """A law of token counts, all at least 1."""

    @abstractmethod
    def at(self, probability: F64) -> I64:
        """Return the quantiles, int64, of ``probability`` [n], each in (0, 1)."""

    def draw(self, n: int, rng: np.random.Generator) -> I64:
        """Return ``n`` independent lengths, int64."""
        uniform = np.maximum(rng.random(n), 2.0**-54)
        lengths = np.empty(n, dtype=np.int64)
        for start in range(0, n, _CHUNK):
            lengths[start : start + _CHUNK] = self.at(uniform[start : start + _CHUNK])
        return lengths

    def grid(self) -> I64:
        """Return equally likely lengths, ascending, that stand for the law where a mean is needed."""
        return self.at((np.arange(_GRID) + 0.5) / _GRID)


class Fixed(Lengths):
    """Always ``tokens``; a bare number means the same."""

    kind: Literal["fixed"] = "fixed"
    tokens: _Tokens
    """The length."""

    def at(self, probability: F64) -> I64:
        return np.full(len(probability), self.tokens, dtype=np.int64)


class _Bounded(Lengths):
    min: _Tokens = 1
    """Shortest length."""
    max: _Tokens = 1_000_000
    """Longest length."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} must be <= max = {self.max}")
        return self


class Uniform(_Bounded):
    """Every whole number from ``min`` to ``max``, equally likely."""

    kind: Literal["uniform"] = "uniform"

    def at(self, probability: F64) -> I64:
        width = self.max - self.min + 1
        steps = np.minimum((probability * width).astype(np.int64), width - 1)
        return self.min + steps


class Lognormal(_Bounded):
    """The exponential of a normal; what falls outside ``min`` and ``max`` is set to them."""

    kind: Literal["lognormal"] = "lognormal"
    median: float | None = Field(default=None, gt=0, le=MAX_TOKENS)
    """Of the lengths; or give the mean."""
    mean: float | None = Field(default=None, gt=0, le=MAX_TOKENS)
    """Instead of the median; before lengths are held to ``min`` and ``max``."""
    sigma: float = Field(ge=0, le=10)
    """Standard deviation of the logarithm."""

    @model_validator(mode="after")
    def _one_centre(self) -> Self:
        if (self.median is None) == (self.mean is None):
            raise ValueError("lognormal needs either median or mean")
        return self

    def at(self, probability: F64) -> I64:
        if self.median is not None:
            centre = float(log(self.median))
        else:
            centre = float(log(self.mean or 1.0)) - self.sigma**2 / 2
        exponent = np.minimum(centre + self.sigma * ndtri(probability), np.log(2.0 * self.max))
        return np.clip(np.rint(exp(exponent)), self.min, self.max).astype(np.int64)


class Quantiles(Lengths):
    """An empirical law: pairs [probability, tokens], between which the logarithm of tokens is linear.

    Beyond the first and the last pair lengths are theirs. ``[[0.1, 54], [0.5, 129], [0.9, 424], [0.99, 601]]`` are the
    outputs of Azure's conversations of 2023 (Patel et al., Splitwise, ISCA 2024).
    """

    kind: Literal["quantiles"] = "quantiles"
    points: Annotated[tuple[tuple[Annotated[float, Field(ge=0, le=1)], _Tokens], ...], Field(min_length=2)]
    """Pairs [probability, tokens], ascending."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for (p, a), (q, b) in zip(self.points, self.points[1:], strict=False):
            if not p < q or a > b:
                raise ValueError(f"points must ascend: [{p}, {a}] is followed by [{q}, {b}]")
        return self

    def at(self, probability: F64) -> I64:
        places, tokens = (np.array(column, dtype=np.float64) for column in zip(*self.points, strict=True))
        return np.rint(exp(np.interp(probability, places, log(tokens)))).astype(np.int64)


class _NumberOrLaw(Choice):
    def _validate(self, value: Any) -> Plugin:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return super()._validate({"kind": "fixed", "tokens": value} if whole else value)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        laws = super().__get_pydantic_json_schema__(schema, handler)
        return {"anyOf": [{"type": "integer", "minimum": 1}, *laws["anyOf"]]}


TokenCount = Annotated[Lengths, _NumberOrLaw(Lengths)]
"""Field type: a `Lengths`, or a bare whole number."""
