"""Links that fail or slow down, by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class LinkFault(BaseModel):
    """Cables that run at ``factor`` of their rate in both directions; 0 takes them out, and traffic goes another way.

    link: a part of the network, which stands for every cable at it (``nic:3``, ``leaf:2``, ``gpu:5``), or one cable by
    its two ends (``nic:3->leaf:3``, in either order). ``*`` stands for any text: ``nic:*`` is every NIC. Where several
    faults meet on one cable, their factors multiply.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    link: Annotated[str, Field(min_length=1)]
    factor: Annotated[float, Field(ge=0, le=1)]
    """Share of the rate that is left; 0: failed."""

    def hits(self, a: str, b: str) -> bool:
        """Say whether the cable between ``a`` and ``b`` is meant."""
        if "->" in self.link:
            return fnmatchcase(f"{a}->{b}", self.link) or fnmatchcase(f"{b}->{a}", self.link)
        return fnmatchcase(a, self.link) or fnmatchcase(b, self.link)


def remaining(faults: Sequence[LinkFault], a: str, b: str) -> float:
    """Return the share of its rate that the cable between ``a`` and ``b`` keeps."""
    share = 1.0
    for fault in faults:
        if fault.hits(a, b):
            share *= fault.factor
    return share
