"""How sure a mean is: intervals over replicas, and over time within one. Pure functions of arrays.

Replicas are independent, so a t-interval of their means is exact for normal means and robust otherwise (`intervals`).
Samples of one run are not: `steady` cuts the warm-up off (MSER-5), measures how many samples one independent one is worth
(the integrated autocorrelation time), and makes an interval of batch means or refuses (`NotEnough`).
"""

from sim.statistics.autocorrelation import autocorrelation_time
from sim.statistics.batches import MIN_TIMES, NotEnough, Steady, batch_means, steady, warm_up
from sim.statistics.intervals import half_width, paired, variance

__all__ = [
    "MIN_TIMES",
    "NotEnough",
    "Steady",
    "autocorrelation_time",
    "batch_means",
    "half_width",
    "paired",
    "steady",
    "variance",
    "warm_up",
]
