"""Would the winner change if this constant were off by 20 %? One constant at a time, how far each would have to be off, and
all together (Sobol indices).

`constants` finds what a scenario assumes, `evaluate` runs it with other values, `standings` says who wins, `oneway` and
`indices` ask the two questions, `answer` holds what came out.
"""

from sim.sensitive.answer import Sensitivity
from sim.sensitive.ask import ask

__all__ = ["Sensitivity", "ask"]
