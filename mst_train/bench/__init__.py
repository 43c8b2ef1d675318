"""Measurements: the method beside other ways to do the same work.

    python -m mst_train.bench +bench=NAME [key=value ...]

step     whole training steps under each memory policy
short    the same at lengths that do not need the method
systems  whole steps of this project, transformers, DeepSpeed's ALST and Liger
peers    the LM head and the MLP alone, as others implement them

measure.py times and weighs the variants of one piece of work; report.py and plot.py show the rows.
"""
