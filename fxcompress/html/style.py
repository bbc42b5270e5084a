"""The style sheet of every page: light and dark by the reader's setting, from 380 pixels up, no font but the system's."""

SHEET = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f5f7fa; --ink: #1b2230; --soft: #566174; --line: #dce1e8; --accent: #2457d6;
  --added: #11734a; --added-paper: #e3f5ec; --removed: #b3261e; --removed-paper: #fdeceb;
  --changed: #8a5a00; --changed-paper: #fdf3dd; --grey: #a9b2bf;
  --c0: #2457d6; --c1: #d9730d; --c2: #138a5e; --c3: #b5359c; --c4: #7a52d1; --c5: #9a6b00; --c6: #c02c3c; --c7: #0d8299;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12161d; --panel: #1b212b; --ink: #e7ebf2; --soft: #9ea9ba; --line: #303947; --accent: #7ba4ff;
    --added: #5fd39c; --added-paper: #12301f; --removed: #ff8f86; --removed-paper: #3a1b1a;
    --changed: #f2c063; --changed-paper: #372a10; --grey: #59657a;
    --c0: #7ba4ff; --c1: #ff9d4d; --c2: #4fd0a0; --c3: #ec7fd6; --c4: #b596ff; --c5: #dcb14a; --c6: #ff8791; --c7: #52c4dc;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 56px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 40px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 26px 0 8px; overflow-wrap: anywhere; }
h4 { font-size: 14px; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 78ch; overflow-wrap: anywhere; }
.lead, figcaption, .soft { color: var(--soft); }
figcaption { font-size: 13px; margin-top: 6px; max-width: 78ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
code, pre, .name {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.9em;
}
code { unicode-bidi: isolate; overflow-wrap: anywhere; }
nav ul, .legend { list-style: none; margin: 10px 0; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }
.legend { font-size: 13px; overflow-wrap: anywhere; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; background: var(--c); }
.cards {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 158px), 1fr)); gap: 12px;
  margin: 18px 0 8px;
}
.card {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; min-width: 0;
}
.card dt { color: var(--soft); font-size: 13px; }
.card dd { margin: 0; overflow-wrap: anywhere; }
.card .value { font-size: 22px; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card .note { font-size: 13px; color: var(--soft); }
.card svg { width: 100%; height: 12px; display: block; margin-top: 8px; }
.was { fill: var(--grey); }
.now { fill: var(--accent); }
.scroll {
  overflow-x: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 8px; background: var(--paper);
}
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.tall { max-height: min(75vh, 760px); overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 8px 10px; font-weight: 600; color: var(--soft); }
th, td {
  text-align: left; padding: 5px 10px; border-top: 1px solid var(--line); vertical-align: top; white-space: nowrap;
}
thead th { background: var(--panel); font-weight: 600; border-top: 0; }
.tall thead th { position: sticky; top: 0; z-index: 1; }
tbody th { font-weight: 500; }
tbody tr:hover { background: var(--panel); }
.number { text-align: right; }
.wrap { white-space: normal; display: block; min-width: 240px; max-width: 640px; overflow-wrap: anywhere; }
.moved { font-weight: 650; color: var(--accent); }
.total { font-weight: 600; }
pre { margin: 0; padding: 10px 12px; background: var(--panel); font-size: 13px; line-height: 1.45; }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; overflow-wrap: anywhere; }
td details { margin: 0; }
td summary { padding: 0; font-weight: 400; }
details.case > summary {
  font-size: 17px; padding: 10px 14px; border: 1px solid var(--line); border-radius: 8px; background: var(--panel);
}
.plots {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 18px;
  align-items: start; margin: 16px 0;
}
.plots > * { min-width: 0; }
figure { margin: 0; }
svg { display: block; }
svg text { fill: var(--soft); font-size: 12px; font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
svg text.name {
  fill: var(--ink); font-size: 11.5px;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.rule { stroke: var(--line); stroke-dasharray: 2 3; }
.base { stroke: var(--soft); }
.level { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 6 4; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); } .grey { --c: var(--grey); }
rect.s0, rect.s1, rect.s2, rect.s3, circle { fill: var(--c); }
rect:hover { opacity: 0.75; }
.curve { fill: none; stroke: var(--c); stroke-width: 2; }
.curve.grey { stroke-width: 1; }
circle.grey { r: 2px; }
.node rect { fill: var(--panel); stroke: var(--line); }
.node .mark { font-weight: 700; font-size: 13px; }
.added rect { fill: var(--added-paper); stroke: var(--added); } .added .mark { fill: var(--added); }
.removed rect { fill: var(--removed-paper); stroke: var(--removed); } .removed .mark { fill: var(--removed); }
.changed rect { fill: var(--changed-paper); stroke: var(--changed); } .changed .mark { fill: var(--changed); }
.removed text.name { text-decoration: line-through; }
.swatch {
  display: inline-block; min-width: 20px; text-align: center; border: 1px solid; border-radius: 4px;
  margin-right: 6px; font-weight: 700;
}
.swatch.added { color: var(--added); background: var(--added-paper); }
.swatch.removed { color: var(--removed); background: var(--removed-paper); }
.swatch.changed { color: var(--changed); background: var(--changed-paper); }
.swatch.same { color: var(--soft); background: var(--panel); }
.edge { fill: none; stroke: var(--soft); stroke-width: 1.2; }
.link { stroke: var(--line); }
.edge:hover { stroke: var(--accent); stroke-width: 2.5; }
.head { font-weight: 700; font-size: 13px; }
footer { margin-top: 44px; padding-top: 14px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }
@media (max-width: 600px) {
  main { padding: 18px 14px 40px; }
  h1 { font-size: 22px; }
  .card .value { font-size: 20px; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; }
}
@media print { .tall { max-height: none; } .scroll { overflow: visible; } }
"""
