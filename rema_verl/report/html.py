"""One HTML file that shows runs: charts, configuration, warnings and a browser of trajectories.

The file needs no network and cannot use one: its content security policy admits two scripts by their hash (Plotly and
page.js) and nothing else, so that a message that got into the page as markup would still not run. Messages do not get
there as markup: they travel as compressed JSON, one element per step, and page.js writes them as text.
"""

import base64
import gzip
import hashlib
import html
import json
import os
from pathlib import Path
from typing import Any, TextIO

from plotly.offline import get_plotlyjs

from rema_verl.dialogue import StopReason
from rema_verl.report.charts import Chart, charts, val_sources
from rema_verl.report.health import LIMITS
from rema_verl.report.run import Run, config_diff
from rema_verl.report.trajectories import length_of, read_step, reward_of

HERE = Path(__file__).parent
FLAGS = ("wrong", "truncated", "lazy", "echo", "leak", "timeout")
QUESTION = 140  # characters of a question in the list


def write_report(runs: list[Run], out: Path) -> None:
    """Write the page for ``runs`` to ``out``, whole or not at all.

    Raises:
        SchemaError: a trajectory file that cannot be read, named.
        OSError: ``out`` cannot be written.
    """
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="xmlcharrefreplace") as page:
            _write(page, runs)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _write(page: TextIO, runs: list[Run]) -> None:
    plotly, script = get_plotlyjs().replace("</script", "<\\/script"), (HERE / "page.js").read_text(encoding="utf-8")
    found = charts(runs)
    sections = list(dict.fromkeys(chart.section for chart in found))
    browsable = [run for run in runs if run.trajectories]
    links = ["Runs", *sections, *(["Configuration"] if any(run.config for run in runs) else []), "Trajectories"]
    title = " · ".join(run.name for run in runs)
    page.write(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:;
 base-uri 'none'; form-action 'none'; script-src {_digest(plotly)} {_digest(script)}">
<title>{_e(title)} · rema-verl</title>
<style>{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<nav><div>{"".join(f'<a href="#{_anchor(link)}">{_e(link)}</a>' for link in links)}</div></nav>
<header><h1>{_e(title)}</h1><p class="soft">rema-verl report. Everything is in this file.</p></header>
<main>
"""
    )
    page.write(f'<section id="runs"><h2>Runs</h2>{_runs_table(runs)}</section>\n')
    place = 0
    for section in sections:
        page.write(f'<section id="{_anchor(section)}"><h2>{_e(section)}</h2>')
        if section == "Health":
            page.write(_warnings_table(runs))
        page.write(f'<div class="grid{" small" if section == "Health" else ""}">')
        for chart in (c for c in found if c.section == section):
            page.write(_chart(chart, place))
            place += 1
        page.write("</div></section>\n")
    page.write(_configuration(runs))
    page.write('<section id="trajectories"><h2>Trajectories</h2>')
    page.write(_browser(runs) if browsable else f'<p class="soft">{_e(NO_TRAJECTORIES)}</p>')
    page.write("</section>\n</main>\n")
    figures = [chart.figure.to_plotly_json() for section in sections for chart in found if chart.section == section]
    page.write(f'<script type="application/json" id="figures">{_json(figures)}</script>\n')
    for number, run in enumerate(runs):
        index = []
        for step, path in run.trajectories.items():
            trajectories = list(read_step(path))
            _packed(page, f"step-{number}-{step}", trajectories)
            index += [_index_row(step, place, t) for place, t in enumerate(trajectories)]
        if run.trajectories:
            _packed(page, f"index-{number}", index)
    page.write(f"<script>{plotly}</script>\n<script>{script}</script>\n</body>\n</html>\n")


NO_TRAJECTORIES = "None on disk: set rema.trajectories.folder to keep some."


def _e(text: Any) -> str:
    return html.escape(str(text))


def _anchor(title: str) -> str:
    return title.lower()


def _json(value: Any) -> str:
    """JSON that may stand inside a script element: no "<" that could end it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _packed(page: TextIO, name: str, value: Any) -> None:
    packed = base64.b64encode(gzip.compress(json.dumps(value, separators=(",", ":")).encode(), 6, mtime=0)).decode()
    page.write(f'<script type="text/plain" id="{name}">{packed}</script>\n')


def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _chart(chart: Chart, place: int) -> str:
    return (
        f'<div class="card"><h3>{_e(chart.title)}</h3><p class="note">{_e(chart.note)}</p>'
        f'<div class="plot" data-figure="{place}"></div></div>'
    )


def _table(head: list[str], rows: list[list[tuple[str, Any]]]) -> str:
    """``rows`` of (class, text)."""
    cells = "".join(f"<th>{_e(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(f'<td class={kind!r}>{_e(text)}</td>' for kind, text in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _percent(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{values[0]:.1%} → {values[-1]:.1%}" if len(values) > 1 else f"{values[0]:.1%}"


def _runs_table(runs: list[Run]) -> str:
    head = ["Run", "Steps", "Validation, first → last", "Training", "Finish rate", "s / step"]
    head += ["Signals beyond limit", "Trajectories"]
    rows = []
    for run in runs:
        seconds = run.series("timing_s/step")[1]
        validation = [f"{source}: {_percent(run.series(m)[1])}" for m, source in val_sources(run).items()]
        warned = {name for name, _, _, _, _ in _crossings(run)}
        steps = f"{min(run.metrics)} to {max(run.metrics)}" if run.metrics else "–"
        if run.unreadable:
            steps += f" ({run.unreadable} unreadable lines)"
        rows.append(
            [
                ("run", run.name),
                ("number", steps),
                ("number", ", ".join(validation) or "–"),
                ("number", _percent(run.series("reward/acc/mean")[1])),
                ("number", _percent(run.series("dialogue/finish_rate")[1])),
                ("number", f"{sum(seconds) / len(seconds):.1f}" if seconds else "–"),
                ("number", f"{len(warned)} of {sum(bool(run.series(name)[0]) for name in LIMITS)}"),
                ("number", f"{len(run.trajectories)} steps"),
            ]
        )
    return _table(head, rows)


def _crossings(run: Run) -> list[tuple[str, int, int, int, float]]:
    """(signal, first step beyond its limit, last one, how many, worst value)."""
    found = []
    for name, limit in LIMITS.items():
        beyond = [(step, value) for step, value in zip(*run.series(name), strict=True) if limit.crossed(value)]
        if beyond:
            worst = (max if limit.above else min)(value for _, value in beyond)
            found.append((name, beyond[0][0], beyond[-1][0], len(beyond), worst))
    return found


def _warnings_table(runs: list[Run]) -> str:
    rows = [
        [
            ("run", run.name),
            ("key", name),
            ("words", LIMITS[name].words),
            ("number", f"{'above' if LIMITS[name].above else 'below'} {LIMITS[name].value:g}"),
            ("number", f"{worst:.3g}"),
            ("number", f"{first} to {last} ({count})" if count > 1 else first),
        ]
        for run in runs
        for name, first, last, count, worst in _crossings(run)
    ]
    if not rows:
        return '<p class="soft">No signal crossed its limit.</p>'
    table = _table(["Run", "Signal", "What it is", "Limit", "Worst", "Steps beyond it"], rows)
    return f'{table}<p class="note">A dashed line in a chart is the limit.</p>'


def _configuration(runs: list[Run]) -> str:
    if not any(run.config for run in runs):
        return ""
    parts = ['<section id="configuration"><h2>Configuration</h2>']
    if len(runs) > 1:
        rows = [[("key", key), *(("value", v) for v in values)] for key, values in config_diff(runs)]
        parts.append(_table(["Key", *(run.name for run in runs)], rows) if rows else "<p>The same in all runs.</p>")
    for run in runs:
        if run.overrides:
            given = _e("\n".join(run.overrides))
            parts.append(
                f"<details><summary>What {_e(run.name)} was started with</summary><pre>{given}</pre></details>"
            )
    return "".join([*parts, "</section>\n"])


def _browser(runs: list[Run]) -> str:
    options = "".join(f'<option value="{i}">{_e(run.name)}</option>' for i, run in enumerate(runs) if run.trajectories)
    stops = "".join(f'<option value="{reason}">{reason}</option>' for reason in map(str, StopReason))
    flags = " ".join(f'<button type="button" aria-pressed="false" data-flag="{f}">{f}</button>' for f in FLAGS)
    orders = {"": "oldest first", "newest": "newest first", "best": "highest reward", "worst": "lowest reward"}
    orders["longest"] = "most tokens"
    return f"""<div id="browser">
<div class="tools"><select id="run" aria-label="run">{options}</select>
<input id="from" type="number" placeholder="from step" aria-label="from step">
<input id="to" type="number" placeholder="to step" aria-label="to step">
<select id="stop" aria-label="stop reason"><option value="">any end</option>{stops}</select>
<select id="order" aria-label="order">{"".join(f'<option value="{k}">{v}</option>' for k, v in orders.items())}</select>
<input id="search" type="search" placeholder="search all texts, Enter" aria-label="search"></div>
<div class="tools"><span id="flags">{flags}</span><span id="count" class="soft" role="status"></span></div>
<div class="browser"><div id="list" tabindex="0" aria-label="trajectories"></div><div id="detail"></div></div>
</div>"""


def _index_row(step: int, place: int, t: dict) -> list:
    return [
        step,
        place,
        t["acc"],
        round(reward_of(t), 4),
        t["stop_reason"],
        t["flags"],
        t["picked"],
        length_of(t),
        " ".join((t["question"] or "")[:QUESTION].split()),
    ]
