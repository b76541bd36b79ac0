"""How long decodes wait for their tokens, without looking at each of them."""

from __future__ import annotations

import numpy as np

from sim.engine.serving.log import Log
from sim.engine.serving.request import Request
from sim.tokens import I64


class Gaps:
    """Gaps between the tokens of the decodes of D ranks, into ``log``. together: no rank ever rests, so all decodes had
    their last tokens together, but for those that joined since."""

    def __init__(self, n_ranks: int, log: Log, *, together: bool) -> None:
        self._log, self._together = log, together
        self._last_ps = np.zeros(n_ranks, dtype=np.int64)  # of the newest tokens of each rank's decodes
        self._late: list[dict[Request, int]] = [
            {} for _ in range(n_ranks)
        ]  # decodes whose last token is older, and when

    def join(self, rank: int, request: Request, *, first: bool) -> None:
        """``request``, whose last token came at its ``last_ps``, decodes; ``first``: nobody else does on its rank."""
        if first and not self._together:
            self._last_ps[rank] = request.last_ps
        elif request.last_ps != self._last_ps[rank]:
            self._late[rank][request] = request.last_ps

    def leave(self, rank: int, request: Request) -> int:
        """Return when the last token of ``request``, which is put back, came."""
        return self._late[rank].pop(request, int(self._last_ps[rank]))

    def count(self, now_ps: int, asking: I64) -> None:
        """Note how long every decode waited for the tokens of an iteration in which ``asking`` [D] took part."""
        log, last = self._log, self._last_ps
        for rank in range(len(last)) if any(self._late) else ():
            if asking[rank]:
                for last_ps in self._late[rank].values():
                    log.gap(now_ps, last_ps)
                    log.gap(now_ps, int(last[rank]), -1)
                self._late[rank].clear()
        if self._together:
            n = int(asking.sum())
            if n:
                log.gap(now_ps, int(last[0]), n)
            last[:] = now_ps
            return
        served = np.flatnonzero(asking)
        if len(served):
            log.gaps(now_ps, last[served], asking[served])
            last[served] = now_ps
