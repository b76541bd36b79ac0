"""Do experts specialise? Loads by topic: how much an expert says about the topic, and how lopsided each topic is."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sim.kernels.elementary import log
from sim.metrics.balance import max_vio
from sim.tokens import F64


def mutual_information_bits(topic_tokens: npt.ArrayLike) -> F64:
    """Return I(topic; expert) in bits of [..., topics, E] counts: 0 if all topics use experts alike, at most the smaller
    of log2(topics) and log2(E).

    >>> mutual_information_bits([[10, 0], [0, 10]]).item(), mutual_information_bits([[5, 5], [9, 9]]).item()
    (1.0, 0.0)
    """
    counts = np.asarray(topic_tokens, dtype=np.float64)
    total = counts.sum(axis=(-2, -1), keepdims=True)
    joint = counts / np.where(total > 0, total, 1.0)
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    # Own logarithm and a written order of additions: libm's and np.sum's last bits depend on the CPU.
    terms = joint * log(np.where(joint > 0, joint / np.where(independent > 0, independent, 1.0), 1.0))
    nats = terms.reshape(*terms.shape[:-2], -1).cumsum(axis=-1)[..., -1]
    bits: F64 = np.maximum(nats / math.log(2.0), 0.0)
    return bits


def topic_max_vio(topic_tokens: npt.ArrayLike) -> F64:
    """Return the mean over topics of MaxVio within a topic, [...] of [..., topics, E]; topics without tokens are left out.

    DeepSeek-V3 report, section 4.5.3 and Figure 9: balance over a batch lets each domain stay lopsided, balance within
    each sequence does not.
    """
    counts = np.asarray(topic_tokens, dtype=np.float64)
    seen = counts.sum(axis=-1) > 0
    return np.asarray((max_vio(counts) * seen).sum(axis=-1) / np.maximum(seen.sum(axis=-1), 1))
