"""What the decodes and prompts of an iteration come down to."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sim.engine.iteration import Work
from sim.engine.serving.request import Request
from sim.tokens import I64


def work_of(
    chunks: Iterable[tuple[int, Request, int]],
    decodes: I64,
    context: I64,
    longest: I64,
    topics: I64,
    queries: int,
    graphs: I64,
) -> Work:
    """Return the work of ``decodes`` [D] requests of ``queries`` tokens each, with [D] tokens of ``context``, the
    ``longest`` [D] of them, and their tokens by topic [topics], and of ``chunks`` (rank, request, new tokens); the last
    three arrays are written to. graphs: ascending sizes that decodes are padded to.

    Kernels tell a decode from a prompt by its query tokens: a chunk of no more than ``queries`` runs as a decode over what
    lies before it, as in vLLM (``split_decodes_and_prefills`` by ``decode_threshold``).
    """
    asking, tokens = decodes.copy(), decodes * queries
    requests, fresh, pairs = np.zeros_like(decodes), np.zeros_like(decodes), np.zeros(len(decodes))
    sampled = tokens.copy()
    for rank, request, n in chunks:
        before = request.computed
        if n <= queries:
            asking[rank] += 1
            tokens[rank] += n
            context[rank] += before + n
        else:
            requests[rank] += 1
            fresh[rank] += n
            pairs[rank] += n * before + n * (n + 1) / 2
        sampled[rank] += before + n == request.prompt
        longest[rank] = max(int(longest[rank]), before + n)
        topics[request.topic] += n
    return Work(
        decode_requests=asking,
        decode_tokens=_padded(tokens, graphs),
        decode_kv_tokens=context,
        prefill_requests=requests,
        prefill_tokens=fresh,
        prefill_pairs=pairs,
        longest=longest,
        sampled=sampled,
        topic_tokens=topics,
    )


def _padded(tokens: I64, graphs: I64) -> I64:
    if not len(graphs):
        return tokens
    at = np.searchsorted(graphs, tokens)
    larger = graphs[np.minimum(at, len(graphs) - 1)]
    return np.where((tokens > 0) & (at < len(graphs)), larger, tokens)
