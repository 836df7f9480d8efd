"""The frame of an HTML report: style for light and dark, phone and desk; its policy forbids every request and script."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>%TITLE%</title>
<style>
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --soft: #57606a; --line: #d8dee4; --panel: #f6f8fa;
  --shade: #00000030; --link: #0550ae; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --text: #e6e9ed; --soft: #a3adb8; --line: #343b44; --panel: #1d2229; --link: #7cb7ff;
    --shade: #000000c0; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1.4rem 0 .3rem; }
.lead p { max-width: none; }
.lead { margin: .8rem 0; padding: .6rem 1rem; background: var(--panel); border-left: .25rem solid var(--mark);
  border-radius: .2rem; font-size: 1.08rem; }
p, ul { margin: .6rem 0; max-width: 52rem; }
ul { padding-left: 1.2rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1.2rem 0 0; padding: .6rem .8rem; font-size: .9rem;
  background: var(--panel); border-radius: .4rem; }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { padding: .7rem .8rem; background: var(--panel); border-radius: .4rem; white-space: pre-wrap; }
/* A shade at an edge says that the table goes on behind it; covers of the page's colour move with the table. */
.wide { overflow-x: auto; margin: .6rem 0 1rem; border: 1px solid var(--line); border-radius: .4rem;
  background: linear-gradient(90deg, var(--back) 50%, transparent) 0 / 2.5rem 100% local no-repeat,
    linear-gradient(270deg, var(--back) 50%, transparent) 100% / 2.5rem 100% local no-repeat,
    linear-gradient(90deg, var(--shade), transparent) 0 / .9rem 100% no-repeat,
    linear-gradient(270deg, var(--shade), transparent) 100% / .9rem 100% no-repeat; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  min-width: 4.5rem; overflow-wrap: break-word; }
th { font-weight: 600; background: var(--panel); }
th.n, td.n { text-align: right; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--back); }
th:first-child { background: var(--panel); }
@media (max-width: 40rem) {
  body { padding: .75rem; }
  td:first-child, th:first-child { max-width: 42vw; }
}
figure { margin: 1rem 0; max-width: 30rem; }
figure svg { display: block; width: 100%; height: auto; color: var(--text); }
figcaption { color: var(--soft); font-size: .88rem; max-width: 52rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; font-weight: 600; color: var(--link); }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
@media print { details { display: block; } .wide { overflow: visible; } nav { display: none; } }
</style>
</head>
<body>
%BODY%
</body>
</html>
"""
