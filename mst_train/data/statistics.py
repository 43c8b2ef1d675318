"""What packing did to the documents: ``packing.json`` and ``lengths.png`` of a prepared folder."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mst_train.data.best_fit import BestFitSequences
from mst_train.data.corpus import Corpus, Documents
from mst_train.data.packing import Sequences
from mst_train.data.splitting import documents_in

Ints = NDArray[np.int64]

BINS = 48
"""The last one holds documents of 2^47 tokens and more."""


def packing_statistics(
    corpus: Corpus,
    packing: str,
    sequence_length: int,
    streams: dict[str, Ints],
    sequences: dict[str, Sequences],
) -> dict[str, Any]:
    """How documents became sequences, as JSON takes it; reads all documents' lengths."""
    whole = np.array([[0, len(corpus.tokens)]])
    counts, tokens, longest = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), 0
    for borders, _ in documents_in(corpus.documents, whole):
        lengths = np.diff(borders)
        places = np.minimum(np.frexp(lengths)[1] - 1, BINS - 1)
        counts += np.bincount(places, minlength=BINS)
        tokens += np.bincount(places, lengths, BINS).astype(np.int64)
        longest = max(longest, int(lengths.max()))
    return {
        "packing": packing,
        "sequence_length": sequence_length,
        **{
            name: _stream(corpus.documents, spans, sequences[name])
            for name, spans in streams.items()
        },
        "documents": len(corpus.documents),
        "mean_document_tokens": round(len(corpus.tokens) / len(corpus.documents), 1),
        "longest_document_tokens": longest,
        "lengths": [
            {"from": 1 << k, "below": 2 << k, "documents": int(counts[k]), "tokens": int(tokens[k])}
            for k in range(BINS)
            if counts[k]
        ],
    }


def _stream(documents: Documents, spans: Ints, sequences: Sequences) -> dict[str, Any]:
    length = sequences.sequence_length
    total = int((spans[:, 1] - spans[:, 0]).sum())
    held = len(sequences) * length
    count = cut = position = 0
    for borders, _ in documents_in(documents, spans):
        places = borders - borders[0] + position  # in the stream
        position = int(places[-1])
        count += len(borders) - 1
        if isinstance(sequences, BestFitSequences):
            cut += int((np.diff(borders) > length).sum())
        else:
            ends = np.minimum(places[1:] - 1, held)
            cut += int((places[:-1] // length != ends // length).sum())
    used = min(total, held)
    if isinstance(sequences, BestFitSequences):
        used = sequences.used_tokens()
    return {
        "sequences": len(sequences),
        "tokens": total,
        "documents": count,
        "documents_cut": cut,
        "documents_cut_share": round(cut / max(1, count), 6),
        "padding_tokens": held - used,
        "padding_share": round((held - used) / max(1, held), 6),
        "tokens_left_out": total - used,
    }


LOG_FROM = 100
"""Documents of one length, from which on they are counted on a logarithmic axis."""


def draw_lengths(statistics: dict[str, Any], path: Path) -> None:
    """Draw ``lengths_figure`` into a file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = lengths_figure(statistics)
    figure.savefig(path, dpi=140, format="png", metadata={"Software": None})


def lengths_figure(statistics: dict[str, Any]) -> Any:
    """Histograms of documents and of tokens by document length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    bins = statistics["lengths"]
    places = [entry["from"] for entry in bins]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, 2), ("documents", "tokens"), strict=True):
        widths = [0.92 * place for place in places]
        panel.bar(places, [entry[name] for entry in bins], widths, align="edge", color="#1f6fb2")
        panel.axvline(statistics["sequence_length"], color="#d97706", label="sequence length")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(_tokens))
        if name == "documents" and max(entry[name] for entry in bins) >= LOG_FROM:
            panel.set_yscale("log")
            panel.set_ylim(bottom=0.5)  # one document has a height, too
            panel.yaxis.set_minor_locator(NullLocator())
        else:
            panel.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        panel.yaxis.set_major_formatter(FuncFormatter(_count))
        panel.set_xlabel("tokens in a document")
        panel.set_title(f"{name} by document length", loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
    return figure


def _tokens(length: float, _: int) -> str:
    return f"{length / 1024:,g}K" if length >= 1024 else f"{length:g}"


def _count(number: float, _: int) -> str:
    return f"{number:,.0f}"
