"""The page around the report: its style for light and dark, its skeleton, the little script."""

from __future__ import annotations

from html import escape

from trimtab.report.style import DARK, LIGHT


def document(title: str, body: str) -> str:
    """A whole HTML document that needs nothing but itself: no network, no framework."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Model output is escaped; this makes sure that nothing on the page could load or send anything anyway.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; media-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_variables()}{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(name: str, title: str, inside: str) -> str:
    """A titled section; nothing where there is nothing inside."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{inside}</section>\n' if inside else ""


def _variables() -> str:
    def lines(colours: dict[str, str], extra: str) -> str:
        return "".join(f"--plot-{k}:{v};" for k, v in colours.items()) + extra

    light = "--page:#f5f6f4;--card:#fefefd;--soft:#eef1f1;--line:#dde3e5;--up:13 110 147;--down:207 95 31;"
    dark = "--page:#0f1417;--card:#161d21;--soft:#1e272c;--line:#2a363c;--up:82 183 216;--down:242 147 90;"
    return (
        f":root{{{lines(LIGHT, light)}}}\n@media (prefers-color-scheme:dark){{:root{{{lines(DARK, dark)}}}}}\n"
        "@media print{:root{--page:#fff;}}\n"
    )


_CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--plot-ink);font:16px/1.55 var(--sans);
  --sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",sans-serif;
  --mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace}
main{max-width:1080px;margin:0 auto;padding:3.2rem 1.4rem 4rem}
h1{font-size:clamp(1.45rem,3.4vw,2.15rem);line-height:1.24;letter-spacing:-.018em;font-weight:620;margin:.5rem 0 .6rem;
  max-width:31em;text-wrap:balance;font-variant-numeric:tabular-nums}
h1 span{font-weight:400;color:var(--plot-muted)}
h1 b{font-weight:760;color:var(--plot-c1)}
h2{font-size:1.18rem;letter-spacing:-.01em;margin:0 0 .8rem}
h3,h4{margin:0;font-size:.86rem}
p{margin:0 0 .8rem}
section{margin-top:3rem}
.eyebrow{color:var(--plot-muted);font-size:.84rem;margin:0}
.eyebrow b{color:var(--plot-ink);font-weight:640}
.remark,.lead{color:var(--plot-muted);max-width:46em}
.lead{font-size:.94rem}
.box{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.15rem}
.range{display:block;width:100%;max-width:760px;height:auto;margin:1.1rem 0 .3rem;overflow:visible}
.range text{font:12.5px var(--sans);fill:var(--plot-muted)}
.range .v{font-weight:700;fill:var(--plot-ink)}
dl.facts{display:flex;flex-wrap:wrap;gap:.7rem 2.1rem;margin:1.5rem 0 1.3rem;padding:0}
dl.facts div{min-width:0}
dl.facts dt{color:var(--plot-muted);font-size:.76rem}
dl.facts dd{margin:0;font-weight:600;font-size:.95rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.command{display:flex;align-items:flex-start;gap:.8rem;background:var(--soft);border-radius:8px;padding:.7rem .9rem}
.command code{flex:1;white-space:pre-wrap;overflow-wrap:anywhere}
code,.text,.prompt,td{font-family:var(--mono);font-size:.82rem;line-height:1.5}
button{font:inherit;font-size:.76rem;color:var(--plot-muted);background:var(--card);border:1px solid var(--line);
  border-radius:6px;padding:.12rem .6rem;cursor:pointer}
select{font:inherit;font-size:.88rem;color:var(--plot-ink);background:var(--card);border:1px solid var(--line);
  border-radius:6px;padding:.1rem .4rem}
.choose{font-size:.94rem;color:var(--plot-muted)}
button:hover{color:var(--plot-ink)}
ul.findings{list-style:none;margin:0;padding:0;display:grid;gap:.55rem}
ul.findings li{padding:.7rem 1rem;border-radius:8px;background:var(--card);border:1px solid var(--line);
  border-left:4px solid var(--plot-c1);max-width:56em;font-size:.95rem}
ul.findings li.calm{border-left-color:var(--plot-c0);color:var(--plot-muted)}
.plots{display:grid;gap:.9rem}
.large{grid-template-columns:repeat(2,minmax(0,1fr));margin-bottom:.9rem}
.small{grid-template-columns:repeat(3,minmax(0,1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.75rem .8rem .6rem;
  min-width:0}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:var(--sans)!important}
figcaption{color:var(--plot-muted);font-size:.78rem;line-height:1.4;margin:.35rem .1rem 0}
details{margin-top:.9rem}
summary{cursor:pointer;color:var(--plot-muted);font-size:.92rem;padding:.25rem 0}
summary:hover{color:var(--plot-ink)}
details>.plots,details>.pair:first-of-type{margin-top:.6rem}
dl.guide{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.1rem 2rem;margin:0}
dl.guide dt{font-weight:640;font-size:.95rem}
dl.guide dd{margin:.15rem 0 0;color:var(--plot-muted);font-size:.92rem}
dl.guide .wide{grid-column:1/-1}
.pair{display:grid;grid-template-columns:minmax(0,.9fr) repeat(2,minmax(0,1fr));background:var(--card);
  border:1px solid var(--line);border-radius:10px;margin-bottom:.7rem;overflow:hidden}
.pair>div{padding:.8rem .95rem}
.pair .ask{background:var(--soft)}
.pair .side{border-left:1px solid var(--line)}
.side h4,.card h4{display:flex;flex-wrap:wrap;align-items:center;gap:.4rem;color:var(--plot-muted);font-weight:600;
  margin-bottom:.45rem}
.prompt,.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:19rem;overflow-y:auto}
.prompt p{margin:0 0 .4rem}
section>.prompt,[id^=group]>.prompt{background:var(--soft);border-radius:8px;padding:.7rem .9rem;margin-bottom:.8rem}
.answer{font-size:.82rem;color:var(--plot-muted);margin:.5rem 0 0}
.answer b{font-family:var(--mono);color:var(--plot-ink)}
.chip{font-size:.73rem;font-weight:600;border-radius:99px;padding:.06rem .5rem;background:var(--soft);
  color:var(--plot-muted);
  font-variant-numeric:tabular-nums}
.chip.good,.chip.up{background:rgb(var(--up)/.14);color:var(--plot-c0)}
.chip.bad,.chip.down{background:rgb(var(--down)/.14);color:var(--plot-c1)}
.none{color:var(--plot-muted);font-style:italic;font-size:.85rem;margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(235px,1fr));gap:.8rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.8rem .95rem;min-width:0}
.p{background:rgb(var(--up)/var(--a));border-radius:3px}
.n{background:rgb(var(--down)/var(--a));border-radius:3px}
.scale{font-size:.8rem;color:var(--plot-muted)}
.scale span{padding:.12rem .5rem;color:var(--plot-ink);border-radius:3px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{text-align:left;font-weight:600;color:var(--plot-muted);font-size:.78rem}
th,td{padding:.34rem .9rem .34rem 0;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
td.num{text-align:right;font-variant-numeric:tabular-nums}th.num{text-align:right}
tr:last-child td{border-bottom:0}
td:first-child{white-space:nowrap}
footer{margin-top:3.2rem;padding-top:1rem;border-top:1px solid var(--line);color:var(--plot-muted);font-size:.82rem}
@media (max-width:820px){.large,.small,dl.guide{grid-template-columns:minmax(0,1fr)}
  .pair{grid-template-columns:minmax(0,1fr)}.pair .side{border-left:0;border-top:1px solid var(--line)}
  main{padding-top:1.8rem}}
@media (min-width:560px) and (max-width:820px){.small{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media print{figure,.pair,.card,.box{break-inside:avoid}button{display:none}}
"""

_SCRIPT = """
for (const s of document.querySelectorAll('select[data-choose]')) {
  s.onchange = () => { for (const o of s.options) document.getElementById(o.value).hidden = !o.selected; };
  s.onchange();  // a browser may remember another choice
}
for (const b of document.querySelectorAll('button[data-copy]')) b.onclick = async () => {
  const text = b.previousElementSibling.textContent;
  try { await navigator.clipboard.writeText(text); b.textContent = 'copied'; }
  catch { getSelection().selectAllChildren(b.previousElementSibling); b.textContent = 'selected'; }
  setTimeout(() => { b.textContent = 'copy'; }, 1500);
};
"""
