"""Floor 0: the numeric hot paths, each written twice with identical bits.

``plain`` is NumPy only, ``compiled`` is Numba; both use the same IEEE float32 multiplications, additions and
comparisons in the same order (no BLAS, no libm, no fused multiply-add), so which one runs changes the speed and never
a result. ``reference`` is the slow, obvious version that tests hold both to.
"""

from __future__ import annotations

import importlib.util
import os

# Loading Numba and its cached kernels costs about 0.9 s; NumPy needs some 2 us more per token and layer.
_WORTH_COMPILING = 400_000


def compiled_enabled(token_layers: int) -> bool:
    """Say whether to use the Numba kernels for work of ``token_layers`` tokens x layers x policies.

    The environment variable GATESIM_KERNELS (``numpy`` or ``numba``) overrides the choice.
    """
    forced = os.environ.get("GATESIM_KERNELS", "")
    if forced in ("numpy", "numba"):
        return forced == "numba"
    return token_layers >= _WORTH_COMPILING and importlib.util.find_spec("numba") is not None
