"""A sequence that several processes share, each with some of its positions.

Everything in a decoder but attention treats each token by itself. For attention the processes
exchange what they have, in two steps, either of which may have one process to itself:

    heads   some positions of all heads -> more positions of some heads (DeepSpeed-Ulysses)
    keys    keys and values of some positions -> those that these positions' queries see

places      which positions each process has
heads       which heads each process attends with, group by group; the first exchange
keys        which keys its queries see, and from whom they come; the second
sequence    a shared sequence: the two together
attention   attention through both, forward and backward
transport   what carries tensors between processes, as the exchanges need it
"""

from mst_train.mst.sharing.attention import attend_shared
from mst_train.mst.sharing.places import Places
from mst_train.mst.sharing.sequence import SharedSequence
from mst_train.mst.sharing.transport import Transport

__all__ = ["Places", "SharedSequence", "Transport", "attend_shared"]
