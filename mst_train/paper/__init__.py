"""The paper's experiments again, as one page: python -m mst_train.paper.

Each piece gives a JSON object; pictures and page are made of these alone.

reported      the paper's own numbers
longest       the longest sequences on one GPU, predicted
several       on several GPUs, predicted
lengths       memory over the sequence's length, predicted
ablations     numbers of chunks, predicted
convergence   training, measured
pieces        all of these, and their files
plot          pictures
sections      the page's parts; words: how they show numbers and paragraphs
page          README.md
"""
