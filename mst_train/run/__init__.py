"""A training run: the loop, where it stands, how it begins and how it ends.

train          the run as a whole: the loop over steps
setup          what comes before the loop and may refuse it
budget         how many steps train.tokens comes to
header         what a run says of itself before its first step
run            what the loop asks for, what it records and saves, and how it ends
folder         who may write to a run's folder, and how it goes on
bad_steps      spikes; whether a bad step is left out or ends the run
deterministic  sums in the same order each time, on a GPU too
profile        torch's profile of some steps
random_state   random number generators, seeded or restored
"""
