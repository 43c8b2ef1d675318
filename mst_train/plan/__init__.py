"""What a run will take, known before it starts: python -m mst_train.plan.

config     the settings of this command, and the devices that they name
predict    memory and time of a step of a configuration on a device
speed      the time of a step; rates: how fast devices are; trial: how fast the one here is
candidates what memory.policy=auto chooses from, and what would help beyond that
buckets    whether smaller buckets of ZeRO's are enough
keep       what blocks keep where memory is left
choose     the fastest of these that fit, at a length or at the longest
search     the longest sequence that fits
progress   how many predictions have been made, while one waits
before     what the training command asks of it before it starts
baseline   the same for transformers' own models
show       predictions for people; plot draws them
"""
