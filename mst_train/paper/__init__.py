"""The paper's experiments again, as one page: python -m mst_train.paper.

Each piece gives a JSON object; pictures and page are made of these alone.

reported           the paper's own numbers
predicted          the longest sequences on one GPU and on several; memory over lengths and chunks
text               what training is measured on
reach              how far back it has what tells the next token
convergence        training, measured
spread             what several seeds say together
pieces             all of these, and their files
plot               pictures of what is predicted
plot_measured      pictures of what is measured
sections           the page's parts about what is predicted
sections_measured  about what is measured
page               README.md
"""
