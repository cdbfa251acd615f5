"""How the page looks. Nothing is loaded from elsewhere: fonts are those of the reader's machine."""

TEXT_FONTS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
CODE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0; }
.sr-card p, .sr-turns p, .sr-promise, .sr-soft { display: block; }
.sr-section h2 { font-size: 1.25rem; font-weight: 600; margin: .6rem 0 .4rem; }
.sr-soft { color: var(--body-text-color-subdued); font-size: .87rem; overflow-wrap: anywhere; margin: .3rem 0; }
.sr-promise { margin: .2rem 0 0; max-width: 76ch; }
.sr-card { border: 1px solid var(--border-color-primary); box-shadow: inset 5px 0 0 var(--sr-tone); border-radius: 8px;
  background: var(--block-background-fill); padding: .9rem 1.3rem; min-height: 6.5rem; }
.sr-card p { margin: .5rem 0 .2rem; overflow-wrap: anywhere; }
.sr-card .text, .sr-turns .text { font-size: 1.12rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.sr-badge { display: inline-block; background: var(--sr-tone); color: #fff; border-radius: 999px; padding: .12rem .7rem;
  font-weight: 600; font-variant-numeric: tabular-nums; }
.sr-card.answer { --sr-tone: #1a7340; }
.sr-card.abstain { --sr-tone: #8a5a00; }
.sr-card.waiting, .sr-card.empty { --sr-tone: #4b5b70; }
.sr-card.error { --sr-tone: #b3261e; }
.sr-turns { list-style: none !important; margin: 0 !important; padding: 0 !important; display: grid; gap: 8px; }
.sr-turns li { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .9rem; margin: 0;
  background: var(--block-background-fill); }
.sr-turns header { display: flex; flex-wrap: wrap; gap: .2rem .5rem; align-items: baseline; }
.sr-turns .who, .sr-turns .comment { color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.sr-turns p { margin: .35rem 0 0; }
.sr-turns .comment::before { content: "“"; } .sr-turns .comment::after { content: "”"; }
.sr-turns ins { background: #cdeed6; color: #0b3d1e; text-decoration: none; border-radius: 3px; padding: 0 .15em; }
.sr-turns del { background: #f8d5d2; color: #6b1511; border-radius: 3px; padding: 0 .15em; }
.sr-chip { border: 1px solid var(--border-color-primary); border-radius: 999px; padding: 0 .55rem; font-size: .8rem; }
.sr-chip.unchecked { border-style: dashed; }
.sr-chip.changed { border-color: #1a7340; }
.sr-tiles { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; }
.sr-tiles div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .5rem .75rem;
  background: var(--block-background-fill); }
.sr-tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.sr-tiles span { color: var(--body-text-color-subdued); font-size: .84rem; }
.sr-plot { margin: .6rem 0 0; }
.sr-plot svg { display: block; width: 100%; max-width: 620px; height: auto; }
.sr-plot text { fill: var(--body-text-color-subdued); font-size: 12.5px; }
.sr-plot .grid { stroke: var(--border-color-primary); stroke-width: 1; }
.sr-plot .curve { fill: none; stroke: #2f7bc0; stroke-width: 2; stroke-linejoin: round; }
.sr-plot .target { stroke: #c2571a; stroke-width: 1.5; stroke-dasharray: 6 4; }
.sr-plot .note { fill: #c2571a; }
.sr-plot .active { fill: #1a7340; }
.sr-plot .chosen { fill: none; stroke: var(--body-text-color); stroke-width: 2; }
.sr-plot i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin: 0 .35em 0 .9em; vertical-align: -1px; }
.sr-plot i.dot { background: #1a7340; } .sr-plot i.ring { border: 2px solid var(--body-text-color); }
.sr-scroll { overflow-x: auto; contain: inline-size; }
.sr-scroll:focus-visible { outline: 2px solid var(--color-accent); }
.sr-table { border-collapse: collapse; width: 100%; min-width: 40rem; font-size: .9rem; }
.sr-table th, .sr-table td { text-align: left; vertical-align: top; padding: .35rem .6rem;
  border-bottom: 1px solid var(--border-color-primary); font-variant-numeric: tabular-nums; }
.sr-table dl { display: grid; grid-template-columns: auto auto; gap: 0 .8rem; margin: 0; justify-content: start; }
.sr-table dd { margin: 0; }
.dark .sr-card.answer { --sr-tone: #2a8a52; } .dark .sr-card.abstain { --sr-tone: #a36d08; }
.dark .sr-plot .note { fill: #ec8a50; } .dark .sr-plot .active { fill: #46b877; } .dark .sr-plot i.dot { background: #46b877; }
@media (max-width: 640px) {
  .sr-tiles { grid-template-columns: 1fr; }
  .sr-tiles div { display: flex; gap: .7rem; align-items: baseline; }
  .sr-plot text { font-size: 17px; }
}
"""
