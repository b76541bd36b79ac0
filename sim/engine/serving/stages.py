"""How many requests are in a stage, and for how long: counted twice, so that Little's law can be checked exactly."""

from __future__ import annotations

from sim.conservation import ConservationError
from sim.engine.serving.request import Request


class Stage:
    """A stage of a request's way. n: requests in it. area_ps: the integral of n over time. stays_ps: what those that left
    stayed, by their own clocks. marks: the integral at moments asked for. Python integers: exact."""

    __slots__ = ("_seen_ps", "area_ps", "marks", "most", "n", "name", "stays_ps")

    def __init__(self, name: str) -> None:
        self.name = name
        self.n = self.most = self.area_ps = self.stays_ps = self._seen_ps = 0
        self.marks: dict[int, int] = {}

    def _to(self, now_ps: int, change: int) -> None:
        self.area_ps += self.n * (now_ps - self._seen_ps)
        self._seen_ps = now_ps
        self.n += change
        self.most = max(self.most, self.n)

    def enter(self, request: Request, now_ps: int) -> None:
        self._to(now_ps, 1)
        request.since_ps = now_ps

    def leave(self, request: Request, now_ps: int) -> int:
        """Return the time that the request stayed."""
        self._to(now_ps, -1)
        stay = now_ps - request.since_ps
        self.stays_ps += stay
        return stay

    def mark(self, now_ps: int) -> None:
        """Remember the integral until now."""
        self.marks[now_ps] = self.area_ps + self.n * (now_ps - self._seen_ps)

    def mean_between(self, begin_ps: int, until_ps: int) -> float:
        """Return the mean number between two marks, of which those not reached are taken to be at the end."""
        begin, until = (self.marks.get(at, self.area_ps) for at in (begin_ps, until_ps))
        return (until - begin) / max(1, until_ps - begin_ps)

    def check(self) -> None:
        """Raise ConservationError unless the stage is empty and its integral is the sum of the stays."""
        if self.n or self.area_ps != self.stays_ps:
            raise ConservationError(
                f"C6 Little's law, {self.name}: {self.n} left, integral {self.area_ps} ps != stays {self.stays_ps} ps"
            )


class System(Stage):
    """The whole way, from a request's arrival to its end."""

    __slots__ = ()

    def arrive(self, now_ps: int) -> None:
        self._to(now_ps, 1)

    def end(self, request: Request, now_ps: int) -> None:
        self._to(now_ps, -1)
        self.stays_ps += now_ps - request.arrival_ps
