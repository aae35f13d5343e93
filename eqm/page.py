"""The parts that the report's page is built of: escaped markup, tables, and the style sheet.

Every string is escaped unless it is :class:`Html`. Knows nothing of what is
reported. Called by report_ood and report_page.
"""

import base64
import html
from collections.abc import Iterable, Sequence

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
PERCENT_95 = "95\N{NO-BREAK SPACE}%"


class Html(str):
    """Markup; any other string is text and is escaped."""

    __slots__ = ()


Child = str | Iterable["Child"]


def el(tag: str, *children: Child, **attributes: str) -> Html:
    """One element; ``class_`` is its class. Text and attributes are escaped."""
    named = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
    opening = "".join(f' {name}="{html.escape(value)}"' for name, value in named)
    if tag in ("img", "meta"):
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{_markup(children)}</{tag}>")


def _markup(child: Child) -> str:
    if isinstance(child, Html):
        return child
    return html.escape(child) if isinstance(child, str) else "".join(map(_markup, child))


def number(value: float) -> Html:
    """Four digits to read, all of them for machines."""
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return exact(value, shown.replace("-", MINUS))


def exact(value: float, shown: str) -> Html:
    """A number as it is to be read, all of its digits for machines."""
    return el("data", shown, value=repr(value))


def picture(png: bytes, alt: str) -> Html:
    """A picture inside the page."""
    return el("img", src=f"data:image/png;base64,{base64.b64encode(png).decode()}", alt=alt)


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Child]], kind: str) -> Html:
    """A table whose first column heads its rows; narrow pages show each row as a block."""
    top = el("tr", [el("th", head, scope="col") for head in heads])
    body = [
        el(
            "tr",
            el("th", row[0], scope="row"),
            [el("td", c, data_head=h) for h, c in zip(heads[1:], row[1:], strict=True)],
        )
        for row in rows
    ]
    whole = el("table", el("caption", caption), el("thead", top), el("tbody", body), class_=kind)
    return el("div", whole, class_="scroll")


def section(heading: str, note: Child, *content: Child) -> Html:
    """A headed part of the page."""
    intro = el("p", note, class_="note") if note else Html("")
    return el("section", el("h2", heading), intro, *content)


def code(digest: str) -> Html:
    """A digest, as such."""
    return el("code", digest)


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load: nothing but what is in the page."""
STYLE = """
:root {
  --paper: #fbfaf7; --card: #fff; --ink: #1d1f24; --soft: #5b606b; --faint: #8d929c;
  --line: #e3e0d8; --sample: #3f51c4; --real: #a85f00; --pass: #146c37; --fail: #b3261e;
  --pass-bg: #e0f2e6; --fail-bg: #fbe5e2; --none-bg: #ecebe6;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14161a; --card: #1c1f25; --ink: #e9e8e4; --soft: #a9adb6; --faint: #838995;
  --line: #30343c; --sample: #93a4ff; --real: #f0a94b; --pass: #7ddb9d; --fail: #ff9a90;
  --pass-bg: #17351f; --fail-bg: #431c19; --none-bg: #2a2d34;
} }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header { padding: 44px 0 8px; }
h1 { margin: 0; font-size: clamp(26px, 4.5vw, 40px); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 20px; letter-spacing: -.01em; }
section { margin: 44px 0 0; }
p { margin: 0; }
.eyebrow { color: var(--soft); margin-bottom: 6px; overflow-wrap: anywhere; }
.note { color: var(--soft); max-width: 74ch; margin-bottom: 14px; overflow-wrap: anywhere; }
.small { color: var(--soft); font-size: 13px; }
.verdict { margin: 14px 0 22px; }
.pill { display: inline-block; padding: 3px 13px; border-radius: 99px; margin-right: 6px; }
.pass { color: var(--pass); } .pill.pass { background: var(--pass-bg); }
.fail { color: var(--fail); } .pill.fail { background: var(--fail-bg); }
.pill.none { background: var(--none-bg); }
.figures { display: grid; gap: 12px; grid-template-columns: minmax(300px, 2fr) 3fr; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px; overflow-wrap: anywhere; }
.tile .big { font-size: 26px; font-weight: 650; letter-spacing: -.02em; line-height: 1.3; }
.tiles .tile { display: flex; flex-direction: column; }
.tiles .big { order: -1; }
.tile .big data { white-space: nowrap; }
.tile .label { font-size: 13px; color: var(--soft); }
.tile.lead { padding: 20px 24px; align-content: center; }
.tile.lead .big { font-size: clamp(48px, 8vw, 72px); line-height: 1.15; color: var(--sample); }
.tile.lead .label { font-size: 16px; font-weight: 600; color: var(--ink); }
.tile.lead .small { font-size: 14px; }
.small.real data { color: var(--real); font-weight: 600; }
data, td, code { font-variant-numeric: tabular-nums; }
.reasons { list-style: none; margin: 10px 0 0; padding: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 12px; }
.reasons li { display: flex; gap: 12px; padding: 9px 16px; overflow-wrap: anywhere; }
.reasons li + li { border-top: 1px solid var(--line); }
.reasons b { display: inline-block; min-width: 12.5em; }
.mark { font-weight: 700; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody th { font-weight: 600; }
.numbers td:not(:last-child) { white-space: nowrap; }
.numbers td:last-child { color: var(--soft); }
.dense :is(th, td) { padding-right: 12px; } .dense tbody th { overflow-wrap: normal; }
.dense td:nth-child(2) { white-space: normal !important; min-width: 8em; }
.dense td .small { display: block; }
.dense .whisker { width: 64px; } .dense td { overflow-wrap: normal; }
.grid tbody th { width: 1%; overflow-wrap: break-word; padding-right: 18px;
  vertical-align: middle; }
.grid td { width: 50%; vertical-align: top; padding: 4px 11px 4px 0; border: 0; }
.grid th { border: 0; } .grid td + td { padding: 4px 0 4px 11px; }
.grid thead th:last-child { padding-left: 11px; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
.grid img { width: 100%; max-width: 640px; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: 13px; }
.film { display: flex; gap: clamp(3px, 1vw, 12px); }
.film figure { flex: 0 1 64px; } .film figcaption { text-align: center; margin-top: 4px; }
.panels { display: grid; gap: 22px 32px; margin-top: 18px;
  grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); }
figure svg { width: 100%; height: auto; max-width: 620px; }
.scroll:has(.published) { border: 1px dashed var(--faint); border-radius: 12px; padding: 2px 16px; }
.published tr:last-child > * { border-bottom: 0; }
.published td { white-space: normal !important; }
.published :is(th, td:nth-child(3)) { white-space: nowrap !important; }
.key { margin-right: 16px; overflow-wrap: anywhere; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; margin-right: 6px;
  border-radius: 3px; background: var(--sample); }
.key.real::before { background: var(--real); }
.whisker { width: 108px; height: 14px; display: block; margin-top: 4px; }
.whisker .axis { stroke: var(--faint); stroke-width: 1; opacity: .55; }
.whisker .range { stroke: var(--sample); stroke-width: 3; stroke-linecap: round; }
.heat svg.cell { width: 96px; height: 40px; display: block; }
.heat .ground { fill: var(--sample); }
.heat .inside { fill: var(--real); fill-opacity: .55; }
.heat .outside { fill: var(--sample); fill-opacity: .55; }
.whisker circle { fill: var(--sample); }
code { font: 11.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
.chain td code { display: inline-block; max-width: 33ch; word-break: break-all; }
.chain ul { margin: 0; padding: 0; list-style: none; }
.chain tr:has(:target) { background: var(--none-bg); }
a { color: var(--sample); text-underline-offset: 2px; }
.settings caption { position: static; width: auto; height: auto; clip-path: none; text-align: left;
  font-weight: 600; padding-bottom: 4px; font-size: 15px; }
.settings thead { display: none; }
.tables { columns: 2 400px; column-gap: 32px; }
.tables .scroll { break-inside: avoid; margin-bottom: 22px; }
.settings th { font-weight: 400; color: var(--soft); width: 48%; overflow-wrap: break-word; }
.settings :is(th, td) { padding-block: 5px; }
footer { margin-top: 56px; padding-block: 18px 48px; color: var(--soft); font-size: 13px;
  border-top: 1px solid var(--line); }
@media (max-width: 720px) {
  .figures { grid-template-columns: 1fr; }
  .tiles { grid-template-columns: 1fr 1fr; }
  main, footer { padding-inline: 16px; }
  header { padding-top: 28px; }
  .numbers thead, .chain thead { position: absolute; clip-path: inset(50%); }
  .numbers tr, .chain tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); }
  .numbers :is(th, td), .chain :is(th, td) { display: flex; gap: 12px; border: 0; padding: 2px 0; }
  .numbers td, .chain td { white-space: normal !important; }
  :is(.numbers, .chain) td::before { content: attr(data-head); flex: 0 0 8.5em;
    color: var(--soft); }
  .grid thead { position: absolute; clip-path: inset(50%); }
  .grid :is(tbody, tr, th, td) { display: block; width: auto !important; padding: 0; }
  .grid tbody :is(th, td + td) { padding: 6px 0 2px; }
  .grid td::before { content: attr(data-head); color: var(--soft); font-size: 12px; }
  td:empty { display: none !important; }
  .reasons b { display: block; }
}
@media print {
  :root { --paper: #fff; --card: #fff; }
  body { font-size: 11px; } main, footer { max-width: none; padding: 0; }
  section { margin-top: 26px; } h2 { break-after: avoid; }
  figure, tr, .tile, .reasons li { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
