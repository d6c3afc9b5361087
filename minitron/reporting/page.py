"""The page around the report's content: its style sheet and the few elements it is made of. Every text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape

from minitron.reporting.drawing import DARK, LIGHT
from minitron.reporting.pictures import Picture


def _variables(colors: dict[str, str]) -> str:
    return "".join(f"--{role}:{color};" for role, color in colors.items())


_CSS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}\n"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main,header,footer{max-width:70rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3rem}
.kind{margin:0;color:var(--muted);font-size:.875rem}
h1{margin:.15rem 0 .6rem;font-size:clamp(1.6rem,4.5vw,2.4rem);line-height:1.15;font-weight:650;letter-spacing:-.015em;overflow-wrap:anywhere}
.lead{margin:0 0 1.75rem;max-width:44rem;font-size:1.0625rem;color:var(--muted)}
.lead strong{color:var(--ink);font-weight:600}
section{margin-top:3.25rem}
#summary{margin-top:0}
h2{margin:0 0 1rem;padding-top:.9rem;border-top:1px solid var(--rule);font-size:1.25rem;font-weight:650;letter-spacing:-.01em}
.facts{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:0 0 1.5rem;background:var(--rule);border:1px solid var(--rule);
  border-radius:10px;overflow:hidden}
.facts div{background:var(--panel);padding:1rem 1.15rem}
dt{color:var(--muted);font-size:.8125rem}
dd{margin:0;font-size:1.6rem;font-weight:600;letter-spacing:-.02em;line-height:1.35;white-space:nowrap}
dd.note{color:var(--muted);font-size:.8125rem;font-weight:400;letter-spacing:0;white-space:normal}
.told{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.25rem;margin:0 0 1.5rem}
.told dt{font-size:.875rem;line-height:1.5rem}
.told dd{font-size:1rem;font-weight:400;letter-spacing:0;line-height:1.5rem;white-space:normal;overflow-wrap:anywhere}
.grid+.card{margin-top:1.25rem}
.absent+.grid{margin-top:1.25rem}
#search td,#speed td{white-space:nowrap}
.scroll{overflow-x:auto}
table{width:100%;border-collapse:collapse;font-size:.9375rem}
th{color:var(--muted);font-weight:500;font-size:.8125rem;text-align:left;vertical-align:bottom}
th,td{padding:.5rem .75rem .5rem 0;border-bottom:1px solid var(--rule)}
tr:last-child td{border-bottom:0}
.n{text-align:right;white-space:nowrap;padding-left:.75rem;padding-right:0}
#search table{font-size:.75rem}
#search th{font-size:.6875rem;white-space:normal}
#search .n{padding-left:.35rem}
tr.strong td{font-weight:650}
tr.start:not(:first-child) td{border-top:2px solid var(--rule)}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.25rem;align-items:start}
.stack{display:grid;gap:1.25rem;min-width:0}
.card{margin:0;padding:1.15rem 1.25rem 1.25rem;background:var(--panel);border:1px solid var(--rule);border-radius:10px;min-width:0}
h3{margin:0;font-size:1rem;font-weight:650}
figcaption{margin:.15rem 0 .8rem;color:var(--muted);font-size:.875rem;line-height:1.45}
figcaption h3{color:var(--ink)}
div.card h3{margin-bottom:.4rem}
svg{display:block;width:100%;height:auto;overflow:visible;stroke-linejoin:round}
.absent{margin:0;padding:.85rem 1.1rem;border:1px dashed var(--rule);border-radius:10px;color:var(--muted)}
pre{margin:0;padding:1rem 1.15rem;overflow-x:auto;background:var(--panel);border:1px solid var(--rule);border-radius:10px;
  font:.8125rem/1.6 ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,monospace}
code{font-family:ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,monospace;font-size:.9em}
summary{cursor:pointer;padding:.35rem 0;color:var(--kept)}
.remark{margin:0 0 1rem;color:var(--muted);font-size:.875rem}
footer{margin-top:3.5rem;padding-top:1rem;padding-bottom:2.5rem;color:var(--muted);font-size:.8125rem}
@media (max-width:46rem){
  header{padding-top:1.75rem}
  section{margin-top:2.5rem}
  .facts{grid-template-columns:repeat(2,1fr)}
  .facts div{padding:.8rem .9rem}
  dd{font-size:1.35rem}
  .grid{grid-template-columns:minmax(0,1fr)}
  main,header,footer{padding-left:.9rem;padding-right:.9rem}
  .card{padding:.9rem .8rem}
  table{font-size:.8125rem}
  th{font-size:.71875rem}
  th,td{padding:.4rem .25rem .4rem 0}
  .n{padding-left:.25rem}
}
@media print{section,.card{break-inside:avoid}}
"""
)


def header(kind: str, title: str, lead: str) -> str:
    """The top of the page; `lead` is markup."""
    opening = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>{opening}</header>'


def footer(text: str) -> str:
    """The bottom of the page."""
    return f"<footer>{escape(text)}</footer>"


def page(title: str, body: str) -> str:
    """A whole document. It may load nothing, so that neither its markup nor a name from a file reaches the network."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(name: str, title: str, *content: str) -> str:
    """A part of the page, with a heading if it has a title; `content` is markup."""
    heading = f"<h2>{escape(title)}</h2>\n" if title else ""
    return f'<section id="{escape(name)}">\n{heading}' + "\n".join(content) + "\n</section>"


def grid(*cards: str) -> str:
    """Cards side by side where there is room; `cards` is markup."""
    return '<div class="grid">\n' + "\n".join(cards) + "\n</div>"


def stack(*cards: str) -> str:
    """Cards above each other, as one cell of a grid; `cards` is markup."""
    return '<div class="stack">\n' + "\n".join(cards) + "\n</div>"


def card(picture: Picture) -> str:
    """A picture with its title and caption."""
    label = escape(f"{picture.title}. {picture.caption}")
    caption = f"<figcaption><h3>{escape(picture.title)}</h3>{escape(picture.caption)}</figcaption>"
    return f'<figure class="card">{caption}<div role="img" aria-label="{label}">{picture.svg}</div></figure>'


def table_card(title: str, table: str) -> str:
    """A table beside pictures; `table` is markup."""
    return f'<div class="card"><h3>{escape(title)}</h3>{table}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, strong: str | None = "", texts: int = 1) -> str:
    """A table whose first `texts` columns are texts, at the left, and whose others are numbers, at the right.

    Rows with a cell equal to `strong` stand out; where there are two columns of texts, a row with a first cell starts a group.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}>{escape(text)}</{tag}>" if at < texts else f'<{tag} class="n">{escape(text)}</{tag}>' for at, text in enumerate(row))

    lines = []
    for row in rows:
        classes = " ".join(name for name, applies in (("strong", strong in row), ("start", texts > 1 and bool(row[0]))) if applies)
        lines.append(f'<tr class="{classes}">{cells("td", row)}</tr>')
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"


def remark(text: str) -> str:
    """A line in small print."""
    return f'<p class="remark">{escape(text)}</p>' if text else ""


def facts(items: Iterable[tuple[str, str, str]]) -> str:
    """The few numbers that matter, as (name, number, note)."""
    return '<dl class="facts">' + "".join(
        f'<div><dt>{escape(name)}</dt><dd>{escape(number)}</dd><dd class="note">{escape(note)}</dd></div>' for name, number, note in items
    ) + "</dl>"  # fmt: skip


def definitions(items: Iterable[tuple[str, str]]) -> str:
    """What, and its figures, line by line."""
    return '<dl class="told">' + "".join(f"<dt>{escape(what)}</dt><dd>{escape(figures)}</dd>" for what, figures in items) + "</dl>"


def absent(file: str, verb: str) -> str:
    """The one line of a section whose file is not there yet."""
    return f'<p class="absent">This run has no <code>{escape(file)}</code> yet: <code>minitron {escape(verb)}</code> writes it.</p>'


def code(text: str) -> str:
    """A block of code or settings."""
    return f"<pre><code>{escape(text)}</code></pre>"


def folded(summary: str, content: str) -> str:
    """Content that opens on demand; `content` is markup."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"
