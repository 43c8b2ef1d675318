"""The paper's experiments again, as one page: python -m mst_train.paper.

Each piece gives a JSON object; pictures and page are made of these alone.

reported      the paper's own numbers
predicted     the longest sequences on one GPU and on several; memory over lengths and chunks
convergence   training, measured
pieces        all of these, and their files
plot          pictures
sections      the page's parts
page          README.md
"""
