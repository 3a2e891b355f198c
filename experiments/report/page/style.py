"""The page's style sheet: light and dark, phone and desktop, screen and paper."""

_LIGHT = """
  --paper: #fbfbfa; --card: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d5d9de; --grid: #e6e9ec;
  --net: #1f6fb4; --dense: #7b8490; --index: #b35900; --rest: #5b4b9a; --file: #2f7d5b; --code: #f1f3f5;
  --band-dense: #f1f2f4; --band-regularize: #fdf0d5; --band-pruned: #dcebf7; --tap: #1f6fb4; --note: #eef5fb;
  --shade: rgb(27 31 36 / .22);
"""
_DARK = """
  --paper: #14171b; --card: #1c2026; --ink: #e8eaed; --soft: #a6afb9; --line: #3a424c; --grid: #2a3038;
  --net: #6fb3f0; --dense: #8b95a1; --index: #f0a656; --rest: #b3a4f0; --file: #6cc79c; --code: #23282f;
  --band-dense: #22262c; --band-regularize: #3a301c; --band-pruned: #1b3045; --tap: #6fb3f0; --note: #1a2836;
  --shade: rgb(0 0 0 / .6);
"""

STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.25rem); line-height: 1.15; margin: .1rem 0 .5rem; letter-spacing: -.015em; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 0 0 .75rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 50rem; }
a { color: var(--net); }
section { margin-top: 2.75rem; padding-top: 1.75rem; border-top: 1px solid var(--line); }
code, pre { font: .86em ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
code { background: var(--code); border-radius: 4px; padding: .08em .3em; }
pre { background: var(--code); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto; line-height: 1.45; }
pre code { padding: 0; background: none; overflow-wrap: normal; font-size: 1em; }
.soft, figcaption, caption { color: var(--soft); }
.eyebrow { color: var(--soft); font-size: .85rem; margin: 0; }
.missing { color: var(--soft); font-style: italic; }
.facts { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .6rem 0 1.2rem; }
.facts div { display: flex; gap: .45rem; }
.facts dt { color: var(--soft); flex: none; } .facts dd { margin: 0; min-width: 0; }
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .75rem; list-style: none; padding: 0; }
.cards li {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1rem 1rem;
  display: flex; flex-direction: column; min-width: 0;
}
.cards .what { font-size: .85rem; color: var(--soft); line-height: 1.3; }
.cards .big {
  font-size: clamp(1.6rem, 4vw, 2.15rem); font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  color: var(--net); font-variant-numeric: tabular-nums;
}
.cards .big.missing { font-size: 1.15rem; line-height: 2.2; color: var(--soft); font-weight: 500; letter-spacing: 0; }
.cards .more { font-size: .85rem; line-height: 1.35; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-top: 1.2rem; font-size: .9rem; }
figure { margin: 1rem 0 1.5rem; }
figcaption { font-size: .9rem; margin-bottom: .35rem; max-width: 50rem; }
svg { display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.plot { padding: 44px 60px 44px 46px; }
.plot svg svg { overflow: hidden; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.event { stroke: var(--ink); stroke-dasharray: 2 3; opacity: .7; }
.curve { fill: none; stroke: var(--net); stroke-width: 2.2; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.curve.second { stroke: var(--dense); stroke-width: 1.6; stroke-dasharray: 5 4; }
.dot { fill: var(--net); } .dot.second { fill: var(--dense); }
svg .value { fill: var(--ink); font-weight: 650; paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
svg .band-name { fill: var(--ink); }
.band-dense { fill: var(--band-dense); } .band-regularize { fill: var(--band-regularize); }
.band-pruned { fill: var(--band-pruned); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; font-size: .88rem; }
.legend, .bars, .patterns { list-style: none; padding: 0; margin: .4rem 0; }
.legend li { display: flex; align-items: center; gap: .45rem; }
.legend svg { flex: none; } .legend rect { stroke: var(--line); }
.bars { display: grid; gap: .7rem; font-size: .95rem; line-height: 1.3; }
.bars li { display: grid; grid-template-columns: 10rem minmax(0, 1fr) 19rem; gap: 0 1rem; align-items: center; }
.bars .figures { font-variant-numeric: tabular-nums; }
.bars .ours .name { font-weight: 650; }
.bar-net { fill: var(--net); } .bar-dense { fill: var(--dense); } .bar-header { fill: var(--ink); }
.bar-index { fill: url(#hatch-index); } .bar-rest { fill: url(#hatch-rest); }
.bar-file, .bar-other { fill: var(--file); }
.track { fill: var(--grid); }
.whisker { stroke: var(--ink); stroke-width: 1.5; }
/* A shade on the side where there is more to see: covers that scroll along hide it at the ends. */
.scroll {
  overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background-color: var(--card);
  background-image:
    linear-gradient(to right, var(--card) 40%, transparent), linear-gradient(to left, var(--card) 40%, transparent),
    linear-gradient(to right, var(--shade), transparent), linear-gradient(to left, var(--shade), transparent);
  background-size: 3rem 100%, 3rem 100%, 1.1rem 100%, 1.1rem 100%; background-repeat: no-repeat;
  background-position: left, right, left, right; background-attachment: local, local, scroll, scroll;
}
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--net); outline-offset: 2px; }
.tall { max-height: 26rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .5rem .75rem; }
th, td { padding: .4rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
thead th { color: var(--soft); font-weight: 550; vertical-align: bottom; overflow-wrap: normal; }
tbody th { font-weight: 550; } tbody tr:last-child > * { border-bottom: 0; }
tfoot > tr > * { white-space: nowrap; border-top: 2px solid var(--line); border-bottom: 0; font-weight: 600; }
.num { text-align: right; } td.num, .tight { white-space: nowrap; }
.layers th[scope=row], .layers thead th:first-child, .layers tfoot th {
  position: sticky; left: 0; background: var(--card); box-shadow: 1px 0 var(--grid);
}
.layers .name { display: block; width: max-content; max-width: 15rem; }
.layers .why { min-width: 11rem; color: var(--soft); }
.mini { width: 84px; margin: .3rem 0 0 auto; }
.epochs thead th { position: sticky; top: 0; background: var(--card); box-shadow: 0 1px var(--grid); }
.mark { border: 1px solid var(--line); border-radius: 999px; padding: .05rem .55rem; white-space: nowrap; }
.mark.pattern { background: var(--net); border-color: var(--net); color: var(--card); font-weight: 600; }
details { margin: .75rem 0; } summary { cursor: pointer; padding: .15rem 0; }
.inner { margin: .3rem 0 .3rem 1rem; }
.patterns { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.8rem, 1fr)); gap: .9rem .5rem; }
.patterns li { text-align: center; font-size: .85rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.patterns svg { margin: 0 auto .35rem; }
.patterns.small { grid-template-columns: repeat(auto-fill, minmax(4rem, 1fr)); margin: .5rem 0; }
.patterns b { font-weight: 650; }
.kept { fill: var(--tap); } .gone { fill: none; stroke: var(--dense); stroke-width: .7; }
.words { background: var(--note); border-left: 4px solid var(--net); padding: .6rem 1.1rem; }
.words p { max-width: 50rem; }
.settings th { font-weight: 500; color: var(--soft); width: 12rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
.only-wide { display: none; }
@media (min-width: 46rem) { .only-wide { display: inline; } }
@media screen and (max-width: 54rem) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .cards .what { min-height: 2.6em; } /* Two lines: figures stand side by side. */
  .bars { gap: 1.1rem; }
  .bars li { display: flex; flex-wrap: wrap; gap: .3rem .6rem; align-items: start; }
  .bars .name { flex: 1 1 5rem; } .bars .figures { text-align: right; } .bars .drawn { order: 1; width: 100%; }
}
@media screen and (max-width: 30rem) {
  .layers .name { max-width: 8rem; }
  .bars { font-size: .88rem; }
  th, td { padding: .35rem .55rem; }
  .settings th, .settings td { display: block; width: auto; border: 0; } .settings th { padding-bottom: 0; }
  .settings td { padding-top: 0; border-bottom: 1px solid var(--grid); }
}
@media print {
  :root { color-scheme: light; LIGHT --paper: #ffffff; }
  body { font-size: 10pt; } .bars, .legend, figcaption { font-size: 8.5pt; } main { max-width: none; padding: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav { display: none; } .bars li { grid-template-columns: 7rem minmax(0, 1fr) 14rem; }
  section { margin-top: 1.2rem; padding-top: .9rem; }
  h2, h3, figcaption { break-after: avoid; }
  figure, .cards li, tr, .patterns li, .bars li, pre { break-inside: avoid; }
  .scroll, .tall { overflow: visible; max-height: none; border: 0; background: none; } pre { white-space: pre-wrap; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; } thead th { white-space: normal; }
  .layers .why { min-width: 0; } .layers th[scope=row] { position: static; box-shadow: none; }
}
""".replace("LIGHT", _LIGHT).replace("DARK", _DARK)
