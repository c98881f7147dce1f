"""Colours and layout of the gauge: one style sheet, scoped to its own class.

Pages of Gradio, the web UI's among them, mark a dark theme with the class `dark`, whatever the
system prefers; a page without Gradio follows the system. The font is the page's own and lengths
are relative, so that the gauge is readable in a column of any width.
"""

from __future__ import annotations

_LIGHT = """\
  --exl-text: #1f2430; --exl-soft: #5b6474; --exl-line: #d9dee7; --exl-card: #ffffff;
  --exl-track: #eceff4; --exl-weights: #4263eb; --exl-cache: #0c8599; --exl-workspace: #e8930c;
  --exl-open: #15aabf; --exl-embedding: #2b8a3e; --exl-loras: #d6336c; --exl-overhead: #9c5fd4;
  --exl-other: #9aa4b2;
  --exl-good: #237032; --exl-good-back: #ebfbee; --exl-bad: #c92a2a; --exl-bad-back: #fff0f0;
  --exl-accent: #3b5bdb;
  --exl-warn: #7a4d00; --exl-warn-back: #fff4d6;"""

_DARK = """\
  --exl-text: #e8ebf1; --exl-soft: #a4adbd; --exl-line: #3b3e47; --exl-card: #1b1c20;
  --exl-track: #2a2c33; --exl-weights: #748ffc; --exl-cache: #3bc9db; --exl-workspace: #ffc14d;
  --exl-open: #0b97a8; --exl-embedding: #8ce99a; --exl-loras: #f783ac; --exl-overhead: #c99bf5;
  --exl-other: #6b7585;
  --exl-good: #69db7c; --exl-good-back: #17301f; --exl-bad: #ff8787; --exl-bad-back: #3a1d20;
  --exl-accent: #91a7ff;
  --exl-warn: #ffd43b; --exl-warn-back: #352c12;"""

_RULES = """\
.exl-gauge { color: var(--exl-text); background: var(--exl-card); font-size: 0.875rem;
  border: 1px solid var(--exl-line); border-radius: 12px; padding: 0.7em 0.9em; line-height: 1.4;
  font-family: var(--font, system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif);
  overflow-wrap: anywhere; container-type: inline-size; }
.exl-gauge * { box-sizing: border-box; color: inherit; }
.exl-gauge dd { font-variant-numeric: tabular-nums; }
.exl-gauge p, .exl-gauge dl, .exl-gauge dd, .exl-gauge h4 { margin: 0; padding: 0; }
.exl-gauge .exl-verdict { display: flex; flex-wrap: wrap; gap: 0.2em 0.7em; font-size: 1.05em;
  align-items: baseline; }
.exl-gauge .exl-badge { font-weight: 650; padding: 0.1em 0.7em; border-radius: 999px; }
.exl-gauge .exl-good { color: var(--exl-good); background: var(--exl-good-back); }
.exl-gauge .exl-bad { color: var(--exl-bad); background: var(--exl-bad-back); }
.exl-gauge .exl-soft { color: var(--exl-soft); }
.exl-gauge .exl-warning { color: var(--exl-warn); background: var(--exl-warn-back);
  border-left: 3px solid var(--exl-warn); border-radius: 4px; padding: 0.3em 0.6em;
  margin-top: 0.5em; }
.exl-gauge .exl-model { color: var(--exl-soft); margin-top: 0.3em; }
.exl-gauge .exl-model > b { color: var(--exl-text); }
.exl-gauge .exl-model > span { display: inline-block; }
.exl-gauge .exl-device { margin-top: 0.6em; }
.exl-gauge .exl-head { display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 0 1em; margin-bottom: 0.35em; }
.exl-gauge .exl-head b { font-weight: 650; }
.exl-gauge .exl-bar { position: relative; display: flex; height: 1.5em; border-radius: 6px;
  overflow: hidden; background: var(--exl-track); }
.exl-gauge .exl-bar > i { display: block; flex: 0 0 auto; height: 100%; min-width: 3px;
  border-right: 1px solid var(--exl-card); }
.exl-gauge .exl-bar > .exl-over { position: absolute; top: 0; bottom: 0; right: 0; min-width: 4px;
  border: 0; border-left: 3px solid var(--exl-bad); background: repeating-linear-gradient(-45deg,
  var(--exl-bad) 0 3px, transparent 3px 9px); }
.exl-gauge .exl-track { position: relative; }
.exl-gauge .exl-end { position: absolute; top: -3px; bottom: -3px; width: 2px;
  margin-left: -2px; background: var(--exl-text); }
.exl-gauge .exl-ends { color: var(--exl-soft); font-size: 0.86em; white-space: nowrap; }
.exl-gauge .exl-key { display: flex; flex-wrap: wrap; gap: 0 1em; color: var(--exl-soft);
  font-size: 0.86em; margin-top: 0.3em; }
.exl-gauge .exl-key > span { display: flex; align-items: center; gap: 0.4em; }
.exl-gauge .exl-bar > .exl-busy { width: 30%; animation: exl-busy 1.6s ease-in-out infinite
  alternate; }
@keyframes exl-busy { to { transform: translateX(233%); } }
@media (prefers-reduced-motion: reduce) { .exl-gauge .exl-bar > .exl-busy { animation: none;
  width: 100%; opacity: 0.5; } }
.exl-gauge .exl-lens { height: 0.6em;
  background: color-mix(in srgb, var(--exl-accent) 22%, transparent); }
.exl-gauge .exl-weights { background: var(--exl-weights); }
.exl-gauge .exl-cache { background: var(--exl-cache); }
.exl-gauge .exl-workspace { background: var(--exl-workspace); }
.exl-gauge .exl-embedding { background: var(--exl-embedding); }
.exl-gauge .exl-open { background: var(--exl-open); }
.exl-gauge .exl-loras { background: var(--exl-loras); }
.exl-gauge .exl-overhead { background: var(--exl-overhead); }
.exl-gauge .exl-own { background: color-mix(in srgb, var(--exl-weights) 35%, var(--exl-other)); }
.exl-gauge .exl-other { background: repeating-linear-gradient(45deg, var(--exl-other) 0 5px,
  color-mix(in srgb, var(--exl-other) 72%, var(--exl-track)) 5px 10px); }
.exl-gauge .exl-free { background: var(--exl-track); }
.exl-gauge .exl-missing { background: repeating-linear-gradient(-45deg, var(--exl-bad) 0 2px,
  transparent 2px 5px); }
.exl-gauge .exl-parts { display: grid; gap: 0.15em 1.6em; margin-top: 0.6em;
  grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); }
.exl-gauge .exl-parts > div { display: flex; align-items: baseline; gap: 0.5em; }
.exl-gauge .exl-parts dt { flex: 1 1 auto; color: var(--exl-soft); font-weight: 400; }
.exl-gauge .exl-parts dd { white-space: nowrap; }
.exl-gauge .exl-swatch { flex: 0 0 auto; width: 0.75em; height: 0.75em; border-radius: 3px;
  border: 1px solid color-mix(in srgb, var(--exl-text) 22%, transparent); }
.exl-gauge .exl-note { color: var(--exl-soft); font-size: 0.92em; margin-top: 0.4em; }
.exl-gauge .exl-verdict b { font-weight: 600; background: none; }
.exl-gauge .exl-proof { margin-top: 0.6em; padding: 0.6em 0.8em; border-radius: 8px;
  background: var(--exl-track); display: grid; gap: 0.1em 1em;
  grid-template-columns: max-content 1fr; }
.exl-gauge .exl-proof dd { text-align: right; }
.exl-gauge .exl-choices { margin-top: 0.6em; }
.exl-gauge .exl-choices > div { display: grid; gap: 0.4em; margin-top: 0.25em;
  grid-template-columns: repeat(5, minmax(0, 1fr)); }
@container (max-width: 40em) { .exl-gauge .exl-choices > div {
  grid-template-columns: repeat(3, minmax(0, 1fr)); } }
@container (max-width: 28em) { .exl-gauge .exl-choices > div {
  grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.exl-gauge .exl-choices > div > button { min-width: 0; text-align: left;
  font: inherit; font-weight: 400; padding: 0.3em 0.4em; border-radius: 8px;
  border: 1px solid var(--exl-line);
  background: var(--exl-card); box-shadow: none; margin: 0; cursor: pointer; }
.exl-gauge .exl-choices > div > button b { display: block; font-weight: 650;
  color: var(--exl-accent); }
.exl-gauge .exl-choices > div > button small { display: block; font-size: 0.92em;
  color: var(--exl-soft); }
.exl-gauge .exl-choices > div > button:hover:enabled { border-color: var(--exl-accent); }
.exl-gauge .exl-choices > div > button:focus-visible { outline: 3px solid var(--exl-accent);
  outline-offset: 2px; }
.exl-gauge .exl-choices > div > button[aria-pressed=true] { border-color: var(--exl-accent);
  box-shadow: inset 0 0 0 1px var(--exl-accent); }
.exl-gauge .exl-choices > div > button:disabled { cursor: default; }
.exl-gauge .exl-choices > div > button:disabled b { color: var(--exl-soft); }
.exl-gauge details { margin-top: 0.2em; }
.exl-gauge summary { cursor: pointer; color: var(--exl-soft); padding-block: 0.15em;
  min-height: 24px; }
.exl-gauge pre { white-space: pre; overflow-wrap: normal; font-size: 0.85em;
  max-height: 22em; overflow: auto; background: var(--exl-track); padding: 0.7em;
  border-radius: 8px; margin: 0.5em 0 0; }
.exl-gauge .exl-task { margin-top: 0.7em; }
@media (forced-colors: active) { .exl-gauge .exl-bar, .exl-gauge .exl-bar > i,
  .exl-gauge .exl-swatch { forced-color-adjust: none; } }
"""

# With the specificity of an id, because the web UI and Gradio style every paragraph.
_RANKED = ":is(#exl, .exl-gauge)"

STYLE = (
    f".exl-gauge {{\n{_LIGHT} }}\n"
    f".dark .exl-gauge {{\n{_DARK} }}\n"
    "@media (prefers-color-scheme: dark) { :root:not(:has(gradio-app)) .exl-gauge {\n"
    f"{_DARK} }} }}\n" + _RULES.replace(".exl-gauge", _RANKED)
)
