"""The whole page: one HTML file that loads nothing, and that a browser would let load nothing."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import Any

from mst_train.report import sections
from mst_train.report.charts import SCRIPT
from mst_train.report.read import Run

COLORS = {
    "ground": ("#fbfbfc", "#14181d"),
    "panel": ("#ffffff", "#1b2127"),
    "ink": ("#1f2933", "#e6e9ec"),
    "faint": ("#68727d", "#98a2ad"),
    "grid": ("#dfe3e8", "#333b44"),
    "line-0": ("#1f6fb2", "#62aee8"),
    "line-1": ("#d97706", "#f5a742"),
    "line-2": ("#15803d", "#4ac26b"),
    "line-3": ("#9333ea", "#c08bfa"),
    "line-4": ("#be123c", "#fb7185"),
    "line-5": ("#0e7490", "#3fc1d9"),
    "area-parameters": ("#334e68", "#5d7fa3"),
    "area-gradients": ("#829ab1", "#a9bdd1"),
    "area-optimizer": ("#627d98", "#7f9cba"),
    "area-checkpoints": ("#2f9e44", "#40b35a"),
    "area-working_set": ("#f08c00", "#f59f2f"),
    "area-head": ("#e03131", "#ef5a5a"),
    "area-other": ("#adb5bd", "#7d8791"),
    "area-overhead": ("#d3d9df", "#56606a"),
}
"""The page's variables by light and in the dark."""

STYLE = """\
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}
h2{font-size:1rem;margin:0}
p{margin:0}
.faint{color:var(--faint);font-size:.85rem}
section{margin-top:1.25rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(7rem,1fr));gap:.75rem}
.card,figure,details{background:var(--panel);border:1px solid var(--grid);border-radius:10px}
.card{padding:.7rem .9rem}
.card b{display:block;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}
.card span{color:var(--faint);font-size:.8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr));gap:1rem}
figure{position:relative;margin:0;padding:.9rem 1rem;min-width:0}
figure>svg{display:block;width:100%;height:auto;margin-top:.4rem}
svg[data-chart]{cursor:crosshair;touch-action:pan-y;user-select:none;-webkit-user-select:none}
svg[data-chart] *{pointer-events:none}
figure button{position:absolute;top:.8rem;right:.8rem;padding:.05rem .5rem;border-radius:6px;
border:1px solid var(--grid);background:none;color:var(--faint);font:inherit;font-size:.8rem}
figure button[aria-pressed=true]{background:var(--ink);color:var(--panel)}
.tip{position:absolute;z-index:1;max-width:50%;padding:.2rem .5rem;border-radius:6px;
border:1px solid var(--grid);background:var(--panel);font-size:.8rem;overflow-wrap:anywhere;
pointer-events:none}
.tip .run{display:flex}
.hint,.caution{margin-top:1.25rem}
.caution{padding:.6rem 1rem;border-left:4px solid var(--line-4);background:var(--panel)}
[hidden]{display:none}
svg *{stroke-linejoin:round}
.key{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.85rem}
.run{display:inline-flex;align-items:baseline}
.dot{flex:none;width:.65em;height:.65em;border-radius:50%;margin-right:.4em}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--grid)}
th{font-weight:500}
td{min-width:4.5rem;overflow-wrap:anywhere}
.parts{width:100%;margin-top:.5rem}
.parts td{min-width:0;white-space:nowrap}
.number{text-align:right}
.bar{width:45%}
.bar i{display:block;height:.7rem;min-width:1px;border-radius:3px}
.share{display:inline-block;min-width:3.2rem;padding:0 .5rem;border-radius:5px;text-align:right;
background:color-mix(in srgb,var(--line-2) calc(var(--share)*45%),transparent)}
details{margin-top:.75rem;padding:.6rem 1rem}
summary{cursor:pointer;font-weight:500}
pre{margin:.6rem 0 0;overflow-x:auto;font-size:.8rem;line-height:1.45}
@media(max-width:600px){main{padding:1rem .5rem 2rem}figure{padding:.8rem .6rem}}
"""


_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"
"""What a browser may do with the page: no request to anywhere, and no script but ours."""


def page(runs: Sequence[Run], predictions: Sequence[dict[str, Any]]) -> str:
    """The page of the first run, compared with the others.

    predictions: as ``memory.over_lengths`` gives them for the first run.
    """
    first = runs[0]
    title = first.name
    if len(runs) > 1:
        title += " compared with " + ", ".join(run.name for run in runs[1:])
    body = [
        f"<header>{sections.heading(first)}</header>",
        sections.figures(runs),
        sections.caution(runs),
        sections.charts(runs, predictions),
        sections.tasks(first),
        sections.details(runs),
    ]
    return (
        "<!doctype html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_variables()}{STYLE}</style>\n</head>\n"
        "<body><main>\n" + "\n".join(part for part in body if part) + "\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _variables() -> str:
    light, dark = (
        "".join(f"--{name}:{pair[way]};" for name, pair in COLORS.items()) for way in (0, 1)
    )
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
