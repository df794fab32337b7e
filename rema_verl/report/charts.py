"""The report's charts: metrics in, Plotly figures out. No HTML here.

In a chart of roles colour is the role and the dash is the run; in all others colour is the run.
"""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from rema_verl.dialogue import META_THINKING, REASONING, ROLES, StopReason
from rema_verl.report.health import LIMITS
from rema_verl.report.run import Run

ROLE_COLOURS = {META_THINKING: "#7c3aed", REASONING: "#0f8a7e"}
RUN_COLOURS = ("#1d4ed8", "#d9480f", "#2b8a3e", "#a61e4d", "#5f3dc4", "#0b7285", "#866118", "#495057")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
STOP_COLOURS = dict(
    zip(map(str, StopReason), ("#2b8a3e", "#e8a317", "#c92a2a", "#a61e4d", "#868e96", "#1d4ed8"), strict=True)
)
STACK_COLOURS = ("#1d4ed8", "#0f8a7e", "#e8a317", "#7c3aed", "#c92a2a", "#0b7285", "#866118", "#a61e4d", "#868e96")
ACTIONS = {"persist": "#1d4ed8", "refine": "#e8a317", "concede": "#c92a2a"}
SMALL_PART = 0.01  # of all the time: what takes less is shown as "other"


@dataclass(frozen=True)
class Chart:
    """``note`` is one sentence below the title: what it shows, and the metrics it shows it with."""

    section: str
    title: str
    note: str
    figure: go.Figure


def charts(runs: list[Run]) -> list[Chart]:
    """Every chart for which some run has data, in the page's order."""
    found = [
        *_outcome(runs),
        *_dialogue(runs),
        *_update(runs),
        *_deliberation(runs),
        *_speed(runs),
        *_health(runs),
    ]
    return [chart for chart in found if chart.figure.data]


def val_sources(run: Run) -> dict[str, str]:
    """Metric of validation accuracy -> its data source.

    >>> val_sources(Run("r", None, {0: {"val-core/math/acc/mean@1": 0.5}}))
    {'val-core/math/acc/mean@1': 'math'}
    """
    found = {name: re.fullmatch(r"val-core/(.+)/(?:acc|reward)/mean@\d+", name) for name in run.names()}
    accuracy = {name: match[1] for name, match in found.items() if match and "/acc/" in name}
    return accuracy or {name: match[1] for name, match in found.items() if match}


def _label(runs: list[Run], run: Run, what: str = "") -> str:
    parts = [run.name] if len(runs) > 1 or not what else []
    return " · ".join([*parts, *([what] if what else [])])


def _line(steps, values, name: str, colour: str, dash: str = "solid", width: float = 2.0, **more) -> go.Scatter:
    # Plotly reads names as a little HTML; a line through one point would be invisible
    mode = more.pop("mode", "lines" if len(steps) > 1 else "markers")
    line = {"color": colour, "dash": dash, "width": width}
    return go.Scatter(x=steps, y=values, name=html.escape(name), mode=mode, line=line, **more)


def _figure(traces: Iterable[go.Scatter | go.Bar], y: str, **layout) -> go.Figure:
    figure = go.Figure([trace for trace in traces if trace.x is not None and len(trace.x)])
    yaxis = {"title": {"text": y, "standoff": 8}, **layout.pop("yaxis", {})}
    xaxis: dict[str, Any] = {"title": {"text": "step"}}
    steps = [step for trace in figure.data for step in trace.x]
    if steps and max(steps) - min(steps) <= 10:  # no half steps
        xaxis["dtick"] = 1
    return figure.update_layout(template=None, xaxis=xaxis, yaxis=yaxis, **layout)


def _run_colour(i: int) -> str:
    return RUN_COLOURS[i % len(RUN_COLOURS)]


def _by_run(runs: list[Run], metric: str, what: str = "") -> list[go.Scatter]:
    return [_line(*run.series(metric), _label(runs, run, what), _run_colour(i)) for i, run in enumerate(runs)]


def _by_role(runs: list[Run], metric: str) -> list[go.Scatter]:
    """``metric`` has a place for the role: "{role}/entropy"."""
    return [
        _line(
            *run.series(metric.format(role=role)),
            _label(runs, run, role),
            ROLE_COLOURS[role],
            DASHES[i % len(DASHES)],
            width=4.0 if role == META_THINKING else 2.0,  # the roles' lines are often the same: both are to be seen
        )
        for i, run in enumerate(runs)
        for role in ROLES
    ]


def _stack(steps, values, name: str, colour: str, hover: str) -> go.Bar:
    return go.Bar(
        x=steps, y=values, name=html.escape(name), marker={"color": colour, "line": {"width": 0}}, hovertemplate=hover
    )


def _stacked(traces: list[go.Bar], y: str, norm: str = "") -> go.Figure:
    more = {"barnorm": norm, "yaxis": {"range": [0, 100]}} if norm else {}
    return _figure(traces, y, barmode="stack", bargap=0, **more)


def _outcome(runs: list[Run]) -> list[Chart]:
    accuracy = _by_run(runs, "reward/acc/mean", "training")
    for i, run in enumerate(runs):
        for j, (metric, source) in enumerate(val_sources(run).items()):
            steps, values = run.series(metric)
            accuracy.append(
                _line(
                    steps,
                    values,
                    _label(runs, run, f"validation {source}"),
                    _run_colour(i),
                    "dot",
                    mode="lines+markers",
                    marker={
                        "size": 9,
                        "symbol": j % 20,
                        "color": _run_colour(i),
                        "line": {"color": "white", "width": 1},
                    },
                )
            )
    rewards = _by_role(runs, "{role}/reward/mean")
    rewards += [
        _line(*run.series("critic/score/mean"), _label(runs, run, "all rows"), _run_colour(i), "dot")
        for i, run in enumerate(runs)
        if not any(run.series(f"{role}/reward/mean")[0] for role in ROLES)
    ]
    return [
        Chart(
            "Outcome",
            "Accuracy",
            "Line: training (reward/acc/mean). Points: validation (val-core/<source>/acc/mean@k).",
            _figure(accuracy, "accuracy", yaxis={"tickformat": ".0%", "rangemode": "tozero"}),
        ),
        Chart("Outcome", "Reward", "Mean per trajectory: <role>/reward/mean.", _figure(rewards, "reward")),
    ]


def _dialogue(runs: list[Run]) -> list[Chart]:
    found = [
        Chart(
            "Dialogue",
            "Turns per role",
            "Messages of a role per dialogue: <role>/turns/mean.",
            _figure(_by_role(runs, "{role}/turns/mean"), "turns", yaxis={"rangemode": "tozero"}),
        ),
        Chart(
            "Dialogue",
            "Tokens per role",
            "Sampled in a step, all dialogues together: <role>/tokens.",
            _figure(_by_role(runs, "{role}/tokens"), "tokens", yaxis={"rangemode": "tozero"}),
        ),
        Chart(
            "Dialogue",
            "Finish rate",
            "Dialogues that ended with the finish flag and an answer to it: dialogue/finish_rate.",
            _figure(_by_run(runs, "dialogue/finish_rate"), "share", yaxis={"tickformat": ".0%", "range": [0, 1.02]}),
        ),
    ]
    for run in runs:
        traces = []
        for reason in map(str, StopReason):
            steps, counts = run.series(f"dialogue/stop_reason/{reason}")
            if any(counts):
                traces.append(_stack(steps, counts, reason, STOP_COLOURS[reason], "%{y:.1f} %"))
        found.append(
            Chart(
                "Dialogue",
                _label(runs, run, "Stop reasons"),
                "How dialogues ended: dialogue/stop_reason/*.",
                _stacked(traces, "% of dialogues", "percent"),
            )
        )
    return found


def _update(runs: list[Run]) -> list[Chart]:
    ratios, clips, grads = [], [], []
    for i, run in enumerate(runs):
        for prefix in ("", *(f"{role}/" for role in ROLES)):  # rema_separate: <role>/actor/...
            role, colour = prefix.strip("/"), ROLE_COLOURS.get(prefix.strip("/"), _run_colour(i))
            for part, dash in (("max", "dot"), ("mean", "solid"), ("min", "dash")):
                steps, values = run.series(f"{prefix}actor/turn_ratio_{part}")
                ratios.append(_line(steps, values, _label(runs, run, f"{role} {part}".strip()), colour, dash))
            for part, dash in (("pg_clipfrac", "solid"), ("pg_clipfrac_lower", "dash"), ("log_ratio_clipfrac", "dot")):
                steps, values = run.series(f"{prefix}actor/{part}")
                clips.append(_line(steps, values, _label(runs, run, f"{role} {part}".strip()), colour, dash))
            grads.append(_line(*run.series(f"{prefix}actor/grad_norm"), _label(runs, run, role), colour))
    return [
        Chart(
            "Update",
            "Turn ratios",
            "New against old policy within the update: actor/turn_ratio_{mean,min,max}. With one update per step, 1.",
            _figure(ratios, "ratio"),
        ),
        Chart(
            "Update",
            "Clip fraction per role",
            "<role>/pg_clipfrac, weighted by rows.",
            _figure(_by_role(runs, "{role}/pg_clipfrac"), "share", yaxis={"rangemode": "tozero"}),
        ),
        Chart(
            "Update",
            "Clip fractions of turns",
            "actor/pg_clipfrac, pg_clipfrac_lower (dual clip), log_ratio_clipfrac (at the cap).",
            _figure(clips, "share", yaxis={"rangemode": "tozero"}),
        ),
        Chart(
            "Update",
            "Entropy per role",
            "Mean over a role's sampled tokens, in nats: <role>/entropy.",
            _figure(_by_role(runs, "{role}/entropy"), "nats", yaxis={"rangemode": "tozero"}),
        ),
        Chart("Update", "Gradient norm", "Before clipping: actor/grad_norm.", _figure(grads, "norm")),
        Chart(
            "Update",
            "vLLM against trainer",
            "Largest difference of a token's probability: training/rollout_probs_diff_max.",
            _figure(
                _by_run(runs, "training/rollout_probs_diff_max"),
                "probability",
                yaxis={"type": "log", "exponentformat": "power"},
            ),
        ),
    ]


def _deliberation(runs: list[Run]) -> list[Chart]:
    found = []
    for run in runs:
        rounds = sorted({int(m[1]) for name in run.names() if (m := re.match(r"mpdf/round_(\d+)/action/", name))})
        for number in rounds:
            traces = [
                _stack(
                    *run.series(f"mpdf/round_{number}/action/{action}"),
                    action,
                    colour,
                    "%{y:.1f} %",
                )
                for action, colour in ACTIONS.items()
            ]
            found.append(
                Chart(
                    "Deliberation",
                    _label(runs, run, f"Actions in round {number}"),
                    f"What the agents chose: mpdf/round_{number}/action/*.",
                    _stacked(traces, "% of actions", "percent"),
                )
            )
    return found


def _speed(runs: list[Run]) -> list[Chart]:
    found = []
    for run in runs:
        parts = {}
        for name in run.names():
            if (m := re.fullmatch(r"timing_s/([^/]+)", name)) and m[1] != "step":
                parts[m[1]] = dict(zip(*run.series(name), strict=True))
        steps = sorted({step for values in parts.values() for step in values})
        total = sum(sum(values.values()) for values in parts.values()) or 1.0
        big = sorted(
            (p for p in parts if sum(parts[p].values()) >= SMALL_PART * total), key=lambda p: -sum(parts[p].values())
        )
        traces = [
            _stack(
                steps,
                [parts[p].get(s, 0.0) for s in steps],
                p,
                STACK_COLOURS[i % len(STACK_COLOURS)],
                "%{y:.2f} s",
            )
            for i, p in enumerate(big)
        ]
        small = [sum(parts[p].get(s, 0.0) for p in parts if p not in big) for s in steps]
        if any(small):
            traces.append(_stack(steps, small, "other", "#ced4da", "%{y:.2f} s"))
        found.append(
            Chart(
                "Speed",
                _label(runs, run, "Where the time goes"),
                "Seconds of a step: timing_s/*.",
                _stacked(traces, "seconds"),
            )
        )
    found.append(
        Chart(
            "Speed",
            "Prefill efficiency",
            "Share of prompt tokens that vLLM's prefix cache served: rollout/cache_hit_rate.",
            _figure(_by_run(runs, "rollout/cache_hit_rate"), "share", yaxis={"tickformat": ".0%", "range": [0, 1.02]}),
        )
    )
    found.append(
        Chart(
            "Speed",
            "Prefill against the least",
            "Prompt tokens that were computed, over the fewest there can be: rollout/prefill_over_minimum.",
            _figure(_by_run(runs, "rollout/prefill_over_minimum"), "ratio", yaxis={"rangemode": "tozero"}),
        )
    )
    found.append(
        Chart(
            "Speed",
            "Idle engines",
            "Share of the time with a dialogue pending in which a vLLM replica had no call: rollout/engine_idle_share.",
            _figure(
                _by_run(runs, "rollout/engine_idle_share"), "share", yaxis={"tickformat": ".0%", "rangemode": "tozero"}
            ),
        )
    )
    found.append(
        Chart(
            "Speed",
            "Throughput",
            "Tokens per second and device, whole step: perf/throughput.",
            _figure(_by_run(runs, "perf/throughput"), "tokens/s", yaxis={"rangemode": "tozero"}),
        )
    )
    return found


def _health(runs: list[Run]) -> list[Chart]:
    found = []
    for name, limit in LIMITS.items():
        figure = _figure(_by_run(runs, name), "", yaxis={"rangemode": "tozero"})
        if figure.data:
            figure.add_hline(y=limit.value, line={"color": "#c92a2a", "dash": "dash", "width": 1})
        sign = "above" if limit.above else "below"
        found.append(
            Chart("Health", name.removeprefix("health/"), f"{limit.words}. Warning {sign} {limit.value:g}.", figure)
        )
    lost = (
        "rollout/failed_trajectories",
        "rollout/skipped_trajectories",
        "reward/grading_errors",
        "trajectories/dropped",
    )
    traces = [
        _line(*run.series(name), _label(runs, run, name), _run_colour(i), DASHES[j])
        for i, run in enumerate(runs)
        for j, name in enumerate(lost)
        if any(run.series(name)[1])
    ]
    found.append(
        Chart("Health", "Lost", f"What failed or was left out: {', '.join(lost)}.", _figure(traces, "trajectories"))
    )
    return found
