"""The expert-level balance loss: F_i = f_i.

DeepSeekMoE (arXiv 2401.06066, section 3.3) and DeepSeek-V2 (report, eq. 23-25) per sequence; Switch (arXiv 2101.03961,
eq. 4), GShard (arXiv 2006.16668, Algorithm 1, first choices) and Mixtral per micro-batch; Qwen3 over the global batch
(arXiv 2501.11873); DeepSeek-V3's complementary sequence-wise loss (report, eq. 17-20).
"""

from __future__ import annotations

from typing import Literal

from sim.gating.balance.router_loss import ExpertLoss


class AuxLoss(ExpertLoss):
    """alpha sum_i f_i P_i, with sum_i f_i P_i = 1 at perfect balance. GShard's l_aux, 1/E sum_e (c_e / S) m_e of first
    choices, is this over E^2.

    Two tokens with probabilities (.7, .2, .1) and (.6, .3, .1) both chose expert 0 of 3, so f = (3, 0, 0). The gradient
    p_j (f_j - sum_i f_i p_i) of the first is .7 x .9, .2 x -2.1, .1 x -2.1:

    >>> import numpy as np
    >>> from sim.gating.balance import Sample, Seen
    >>> from sim.gating.piece import GateShape
    >>> from sim.gating.score.softmax import Softmax
    >>> p = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], np.float32)
    >>> ids, zeros = np.zeros((2, 1), np.int16), np.zeros(2, np.int32)
    >>> sample = Sample(0, 0, np.log(p), p, ids, zeros, zeros, Softmax())
    >>> seen, shape = Seen(np.array([[[2, 0, 0]]]), None, (sample,)), GateShape(3, 1)
    >>> round(AuxLoss().value(seen, shape), 3)
    1.95
    >>> AuxLoss().gradient(seen, shape)[0].round(3).tolist()
    [[0.675, -0.48, -0.195]]
    >>> rule = AuxLoss()
    >>> (rule.update(rule.start(shape), seen, shape, step=0) < 0).tolist()
    [[True, False, False]]
    """

    kind: Literal["aux_loss"] = "aux_loss"
