"""Statistics of recorded routing, and generators fitted to them. Knows traces and the affinity generator, no gates.

`statistics` measures one layer of one trace, `synthesis` makes the generator's trace of the same sequences, `fit` finds
the parameters that make the two agree, `block` writes them as a traffic block.
"""
