"""How many requests are in a stage, and for how long: counted twice, so that Little's law can be checked exactly."""

from __future__ import annotations

from sim.conservation import ConservationError
from sim.engine.serving.request import Request


class Stage:
    """A stage of a request's way. n: requests in it. area_ps: the integral of n over time. stays_ps: what those that left
    stayed, by their own clocks. Python integers: exact."""

    __slots__ = ("_seen_ps", "area_ps", "most", "n", "name", "stays_ps")

    def __init__(self, name: str) -> None:
        self.name = name
        self.n = self.most = self.area_ps = self.stays_ps = self._seen_ps = 0

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
