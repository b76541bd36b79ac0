"""How long a pipeline's chunks take: every micro-batch with its own loads, many of them in one array recurrence.

Within a chunk the ranks of an EP group run as in `sim.engine.training`: two streams, waiting for whoever sends to them.
Between chunks they run in step: a chunk starts on all ranks at once and lasts until the last of them is done. Every MoE
layer's exchange brings them together twice anyway; the tests hold the error of this to a percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sim.conservation import check_flops
from sim.engine.chain import Item, Key, chain, ends, expert_part, interleave
from sim.engine.durations import Durations, Way, slowed_ps
from sim.engine.maxplus import makespans
from sim.engine.plan import Op
from sim.exchange import Exchange
from sim.network import Network
from sim.pipeline import Chunk, Pass
from sim.pipeline.blocks import Block
from sim.scenario import Scenario
from sim.settings import Policy
from sim.tokens import F64, I64

AT_ONCE = 64
"""Chunks whose times are computed together: more need memory, fewer cost time."""

_WAYS: dict[str, Way] = {"backward": "backward", "input_gradients": "input", "weight_gradients": "weights"}


class ChunkTimes:
    """Times of the chunks of the pipeline ranks that hold ``stages``, under one policy.

    stages: blocks by stage number. exchanges: by MoE layer (0-based), those of all micro-batches behind one another,
    group after group (`Exchange.stack`).
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: Policy,
        network: Network,
        stages: Mapping[int, Sequence[Block]],
        exchanges: Mapping[int, Exchange],
    ) -> None:
        self.stages, self.exchanges = stages, exchanges
        self.micro_batches = scenario.schedule.micro_batches
        self.recompute = scenario.schedule.recompute == "full"
        self.n_ranks = scenario.parallel_of(policy).ep_size
        self.durations = {side: Durations(scenario, policy, network, side) for side in (False, True)}
        self.shared = self.durations[False].model.shared_expert_parameters > 0
        self._known: dict[tuple[bool, int, str, str], tuple[I64, I64 | None]] = {}
        self.billed_pairs = 0

    def times_ps(self, chunks: Sequence[Chunk], group: int, slowdown: F64) -> I64:
        """Return the times [n] of ``chunks`` on the devices of one EP group; slowdown: [P], 1 for a device in order."""
        found = np.zeros(len(chunks), dtype=np.int64)
        alike: dict[tuple[str, int, int], list[int]] = {}
        for i, (kind, forward, backward) in enumerate(chunks):
            at = (kind, forward.stage if forward else -1, backward.stage if backward else -1)
            alike.setdefault(at, []).append(i)
        for numbers in alike.values():
            for start in range(0, len(numbers), AT_ONCE):
                some = numbers[start : start + AT_ONCE]
                found[some] = self._alike_ps([chunks[i] for i in some], group, slowdown)
        return found

    def check(self) -> None:
        """Raise ConservationError unless every (token, expert) pair was billed three times: forward, dgrad, wgrad."""
        used = [
            self.durations[False].moe_index[block.layer]
            for blocks in self.stages.values()
            for block in blocks
            if block.kind == "moe"
        ]
        pairs = sum(int(self.exchanges[layer].rows.sum()) for layer in used)
        flops = self.durations[False].model.expert_flops
        again = 4 if self.recompute else 3
        check_flops(self.billed_pairs * flops, pairs * again, flops)

    def _alike_ps(self, chunks: Sequence[Chunk], group: int, slowdown: F64) -> I64:
        """Times of chunks of one kind and the same stages."""
        kind, forward, backward = chunks[0]
        parallel = self.durations[False].parallel.tp_size > 1
        chains: list[list[list[Item]]] = []
        micro: dict[int, I64] = {}

        def add(number: int, way: Way, passes: Sequence[Pass]) -> None:
            blocks = self.stages[passes[0].stage]
            micro[number] = group * self.micro_batches + np.array([p.micro_batch for p in passes])
            first: list[list[Item]] = []
            if self.recompute and way in ("backward", "input"):
                first = chain(number, "forward", blocks, shared=self.shared, tensor_parallel=parallel)
            before = ends(first[-1]) if first else ()
            rest = chain(number, way, blocks, shared=self.shared, tensor_parallel=parallel, before=before)
            chains.append([*first, *rest])

        if forward is not None:
            add(0, "forward", [chunk.forward for chunk in chunks if chunk.forward])
        if backward is not None:
            add(1, _WAYS.get(kind, "backward"), [chunk.backward for chunk in chunks if chunk.backward])
        program = interleave(chains)
        index = {item.key: i for i, item in enumerate(program)}
        ops = []
        for item in program:
            duration, transfer = self._duration(item.key, kind == "overlapped", micro[item.key.chain])
            if item.stream == "compute":
                duration = slowed_ps(duration, slowdown)
            after = tuple(sorted(index[key] for key in item.after))
            backward_op = item.key.way != "forward"
            ops.append(
                Op(
                    item.key.phase,
                    item.key.block.layer,
                    item.key.chain,
                    backward_op,
                    item.stream,
                    after,
                    duration,
                    transfer,
                )
            )
        return makespans(ops, self.n_ranks, len(chunks))

    def _duration(self, key: Key, overlapped: bool, micro: I64) -> tuple[I64, I64 | None]:
        """Durations [n, P] and transfers [n, P, P] of one operation in the ``n`` micro-batches numbered ``micro``."""
        d, phase = self.durations[overlapped], key.phase
        if phase in ("dispatch", "combine", "experts", "experts_wgrad"):
            layer = d.moe_index[key.block.layer]
            part = expert_part(key)
            name = (overlapped, layer, phase, "" if phase in ("dispatch", "combine") else part)
            if name not in self._known:
                exchange = self.exchanges[layer]
                self._known[name] = (
                    d.transfer_ps(exchange, phase)  # type: ignore[arg-type]
                    if phase in ("dispatch", "combine")
                    else (d.experts_ps(exchange, part), None)
                )
            duration, transfer = self._known[name]
            if transfer is None:
                self.billed_pairs += int(self.exchanges[layer].rows[micro].sum())
            return duration[micro], None if transfer is None else transfer[micro]
        return np.full((len(micro), self.n_ranks), d.even_ps(key.block, phase, key.way), dtype=np.int64), None
