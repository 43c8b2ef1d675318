"""Names of the profiler ranges that mark the parts of a step.

They name the parts in a profile of torch's, and the memory tracker tells by them what a tensor was
made for.
"""

BLOCK_RANGE = "mst_train::block"
HEAD_RANGE = "mst_train::head"
OPTIMIZER_RANGE = "mst_train::optimizer"
HOST_RANGE = "mst_train::host"
