"""What a run will take, known before it starts.

predict   memory and time of a step of a configuration on a device
speed     how fast a device does what a step does
choose    memory.policy=auto: the fastest settings that fit
search    the longest sequence that fits
sweep     predictions over lengths
show      predictions for people; plot draws them
"""
