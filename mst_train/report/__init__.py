"""A run as one HTML page that needs nothing else: python -m mst_train.report run.dir=DIR.

config     the settings of this command
read       a run's folder
tokenizers whether the losses of several runs can be compared
memory     what the planner says of its memory at other lengths
charts     SVG drawings whose colours are the page's; charts.js tells their values
sections   the parts of the page, and page the whole of it
"""
