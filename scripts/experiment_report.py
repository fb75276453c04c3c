# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What scripts/experiment measured, as Markdown and as a page with charts."""

import math
import os
import re
import statistics

from experiment_alternatives import FAST_PATH


def summary(results, quick, scenarios, alternatives):
    """(scenario, alternative) → medians over runs."""
    table = {}
    for scenario in scenarios:
        for name in alternatives:
            rows = [r for r in results if (r["scenario"], r["alternative"], r["quick"]) ==
                    (scenario.name, name, quick)]
            good = [r for r in rows if "failed" not in r]
            if not rows:
                continue
            if not good:
                table[scenario.name, name] = {"failed": rows[-1]["failed"]}
                continue
            def median(value):
                return statistics.median(value(r) for r in good)
            base = [r for r in results if (r["scenario"], r["alternative"], r["quick"]) ==
                    (scenario.name, "direct", quick) and "failed" not in r]
            whole = statistics.median(r["machine_cpu_s"] / r["sent"] for r in base) if base else None
            own = lambda r: 1e6 * (r["process_cpu_s"] + r["bpf_s"]) / max(r["received"], 1)
            if name in FAST_PATH and not scenario.subscribers:
                own = lambda r: 1e6 * r["bpf_s"] / max(r["received"], 1)
            core = lambda r: 1e6 * (r["process_cpu_s"] + r["receive_cpu_s"]) / max(r["received"], 1)
            table[scenario.name, name] = {
                "runs": len(good),
                "delivered": min(r["received"] / r["sent"] for r in good),
                "right": None if scenario.subscribers else min(r["right"] / r["sent"] for r in good),
                "own_us": median(own),
                "own_spread": max(map(own, good)) - min(map(own, good)),
                "machine_us": None if whole is None else
                median(lambda r: 1e6 * r["machine_cpu_s"] / r["sent"]) - 1e6 * whole,
                "core_us": median(core) if scenario.pinned else None,
                "p50_us": median(lambda r: r["p50_us"]),
                "p99_us": median(lambda r: r["p99_us"]),
                "rss_mb": median(lambda r: r["rss_kb"]) / 1024,
            }
    return table


def table_of(title, about, heading, lines_):
    """(Markdown, page) of a table."""
    md = [f"## {title}", "", about, "", "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    md += ["| " + " | ".join(line) + " |" for line in lines_] + [""]
    cells = "".join("<tr>" + "".join(f"<td>{c.replace('`', '')}</td>" for c in line) + "</tr>" for line in lines_)
    return md, [f"<h2>{title}</h2><p>{about}</p>",
                "<table><tr>" + "".join(f"<th>{h}</th>" for h in heading) + f"</tr>{cells}</table>"]


def of_frames(frames):
    ways = dict.fromkeys(f["way"] for f in frames)
    flows = dict.fromkeys(f["flows"] for f in frames)
    ns = {(f["way"], f["flows"]): f["ns"] for f in frames}
    heading = ["", *(h for n in flows for h in (f"{short(n)} flows, ns a message", "messages a second a core"))]
    return table_of(
        "The datapath alone on a CPU",
        "PUBLISHes of 200 B as XDP frames, as a network card's driver has them; above, they come from sockets and veth copies each. "
        "All that this CPU does for a frame, veth's receiving and sending, too.", heading,
        [[way, *(c for n in flows for c in (f"{ns[way, n]:.0f}", f"{1e9 / ns[way, n]:,.0f}"))] for way in ways])


def bars(title, unit, values):
    """A bar chart as SVG; values: [(name, number)]."""
    most = max((v for _, v in values), default=1) or 1
    height = 26 * len(values) + 40
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}" '
           f'font-family="sans-serif" font-size="13">',
           f'<text x="0" y="16" font-weight="bold">{title}</text>']
    for i, (name, value) in enumerate(values):
        y = 30 + 26 * i
        colour = "#d9822b" if name in ("predicted", "delayed", "relay", "katran", "katran-delayed") else "#7b93ad"
        width = max(1, 420 * value / most)
        out.append(f'<text x="120" y="{y + 14}" text-anchor="end">{name}</text>'
                   f'<rect x="128" y="{y}" width="{width:.1f}" height="19" fill="{colour}"/>'
                   f'<text x="{134 + width:.1f}" y="{y + 14}">{value:,.{0 if value >= 100 else 2}f} {unit}</text>')
    return "\n".join(out + ["</svg>"])


# How cost grows: plot, title, what x is, whether x is logarithmic.
GROWTH = [
    ("flows", "A PUBLISH of its flow's topic, by flows that take turns", "flows", True),
    ("clients", "A SYN with a prediction, by clients that take turns", "clients", True),
    ("routes", "A PUBLISH of a new topic, by routes", "routes", True),
    ("groups", "A PUBLISH of its flow's topic, by groups", "groups", True),
    ("segment", "A segment full of topics that nobody has published (cold caches)", "bytes of payload", False),
    ("connections", "A connection with one message: datapath, balancer and sidecar", "connections a second", True),
    ("relay", "A message: datapath, balancer and relays", "per cent through relays", False),
]
COLOURS = ["#7b93ad", "#d9822b", "#3f8f5f", "#8a5fb0"]


def short(n):
    for least, unit in ((1e6, " M"), (1e3, " k")):
        if n >= least:
            return f"{n / least:.3g}{unit}"
    return f"{n:.3g}"


def lines(title, x_title, logarithmic, series):
    """A line chart as SVG; series: [(name, [(x, nanoseconds)])]."""
    left, top, width, height = 64, 48, 520, 190
    xs = sorted({x for _, points in series for x, _ in points})
    # Four steps of a round number.
    quarter = (max(y for _, points in series for _, y in points) or 1) / 4
    power = 10 ** math.floor(math.log10(quarter))
    most = 4 * next(power * n for n in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if power * n >= quarter)
    place = (lambda x: math.log10(max(x, 1))) if logarithmic else (lambda x: x)
    first, span = place(xs[0]), (place(xs[-1]) - place(xs[0])) or 1
    at = lambda x, y: (left + width * (place(x) - first) / span, top + height * (1 - y / most))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="{top + height + 52}" '
           f'font-family="sans-serif" font-size="13">', f'<text x="0" y="16" font-weight="bold">{title}</text>',
           f'<text x="0" y="38" fill="#555">nanoseconds</text>']
    for i in range(5):
        value = most * i / 4
        y = at(xs[0], value)[1]
        out.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                   f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for x in xs:
        out.append(f'<text x="{at(x, 0)[0]:.1f}" y="{top + height + 18}" text-anchor="middle">{short(x)}</text>')
    out.append(f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle" fill="#555">{x_title}</text>')
    for i, (name, points) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(x, y) for x, y in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in (at(x, y) for x, y in points)]
        out.append(f'<rect x="{left + width + 20}" y="{top + 22 * i}" width="14" height="4" fill="{colour}"/>'
                   f'<text x="{left + width + 40}" y="{top + 22 * i + 8}">{name}</text>')
    return "\n".join(out + ["</svg>"])


def growth(points):
    """(Markdown, page) of how cost grows."""
    md, body = ["## How cost grows", ""], ["<h2>How cost grows</h2>"]
    for plot, title, x_title, logarithmic in GROWTH:
        here = [p for p in points if p["plot"] == plot]
        if not here:
            continue
        ways = dict.fromkeys(p.get("way", "with mqtt_fwd") for p in here)
        series = [(way, [(p["x"], p["ns"]) for p in here if p.get("way", "with mqtt_fwd") == way]) for way in ways]
        if "bare_ns" in here[0]:
            series.insert(0, ("bare chain", [(p["x"], p["bare_ns"]) for p in here]))
        elif plot == "relay":
            series[0] = ("mqtt-fwd", series[0][1])
        xs = [x for x, _ in series[0][1]]
        md += [f"### {title}", "", f"| {x_title} | " + " | ".join(short(x) for x in xs) + " |",
               "|---" * (len(xs) + 1) + "|"]
        md += [f"| {name}, ns | " + " | ".join(f"{dict(values).get(x, float('nan')):.0f}" for x in xs) + " |"
               for name, values in series] + [""]
        body.append(lines(title, x_title, logarithmic, series))
    return md, body


def head(pinned):
    shared = ["machine above direct, µs"]
    alone = ["with its network stack, µs", "messages a second a core"]
    return ["alternative", "delivered", "right group", "own CPU, µs a message", "× its balancer alone", *(alone if pinned else shared),
            "p50, µs", "p99, µs", "memory, MB"]


# What stands behind mqtt-fwd, alone.
BALANCER = {"predicted": "vip-per-topic", "delayed": "vip-per-topic", "katran": "katran-alone",
            "katran-delayed": "katran-alone"}


def times_its_balancer(table, scenario, name, own_us):
    alone = table.get((scenario.name, BALANCER.get(name)))
    return "–" if not alone or "failed" in alone or not alone["own_us"] else f"{own_us / alone['own_us']:.2f}"


def rows(table, scenario, alternatives, no_groups):
    for name in alternatives:
        r = table.get((scenario.name, name))
        if not r:
            continue
        if "failed" in r:
            yield [name, "failed: " + r["failed"]] + [""] * (len(head(scenario.pinned)) - 2)
            continue
        if r["right"] is None:
            right = "–"
        else:
            right = "none is chosen" if name in no_groups else f"{100 * r['right']:.2f} %"
        spread = f" ± {r['own_spread'] / 2:.2f}" if r["runs"] > 1 else ""
        own = "–" if name in ("direct", "nftables") else f"{r['own_us']:.2f}{spread}"
        if scenario.pinned:
            more = ["–", "–"] if not r["core_us"] else [f"{r['core_us']:.2f}", f"{1e6 / r['core_us']:,.0f}"]
        else:
            more = ["–" if name == "direct" or r["machine_us"] is None else f"{r['machine_us']:.1f}"]
        memory = "–" if not r["rss_mb"] else f"{r['rss_mb']:.0f}"
        yield [name, f"{100 * r['delivered']:.2f} %", right, own,
               times_its_balancer(table, scenario, name, r["own_us"]), *more,
               f"{r['p50_us']:.0f}", f"{r['p99_us']:.0f}", memory]


def report(results, frames, points, functional, out, scenarios, alternatives, no_groups):
    kernel, cpus = os.uname().release, os.cpu_count()
    md = ["# mqtt-fwd beside what one would use instead", ""]
    body = []
    reading = [
        f"Linux {kernel}, {cpus} CPUs, veth. Medians over runs; ± is half of the range; delivery is the worst run's.",
        "Own CPU is what the balancer itself used: of BPF programs the kernel's run time (with the clock that "
        "measures it), of processes user and system time. What the kernel's TCP costs a proxy in soft interrupts "
        "is only in *machine above direct*, which is noisy: generator, sink and balancer share the CPUs.",
        "Where the balancer has a CPU alone, proxies have one thread, and what the interfaces of the balancer's host receive is done "
        "there by kernel threads (threaded NAPI): *with its network stack* is all that this CPU did for a message, and "
        "*messages a second a core* its reciprocal, an extrapolation wherever that CPU was not full.",
        "With subscribers, mosquitto is where the sinks are otherwise. `direct` is then one broker for all, HAProxy six "
        "that know nothing of each other, and with mqtt-fwd, publishers of one topic go straight, subscribers through relays.",
        "Quick runs are some seconds of each load, at its rate. At low rates a message costs more than at high ones: "
        "each finds cold caches and a sleeping process.",
        "HAProxy and NGINX choose no group: they carry the same bytes with less to decide. The hub's brokers are "
        "subscribers of it.",
        "veth has no network card: no interrupts, no DMA, no multi-queue. Latency of one wake-up dominates.",
    ]
    for quick in (False, True):
        table = summary(results, quick, scenarios, alternatives)
        if not table:
            continue
        md += [f"## {'Quick runs (seconds)' if quick else 'Full runs'}", ""]
        body.append(f"<h2>{'Quick runs (seconds)' if quick else 'Full runs'}</h2>")
        for scenario in scenarios:
            table_rows = list(rows(table, scenario, alternatives, no_groups))
            if not table_rows:
                continue
            heading = head(scenario.pinned)
            said = f" Published: {scenario.published}." if scenario.published else ""
            md += [f"### {scenario.name}: {scenario.about}", "", f"Expected: {scenario.expect}.{said}", "",
                   "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
            md += ["| " + " | ".join(line) + " |" for line in table_rows] + [""]
            cells = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in table_rows)
            body += [f"<h3>{scenario.name}: {scenario.about}</h3><p>Expected: {scenario.expect}.{said}</p>",
                     "<table><tr>" + "".join(f"<th>{h}</th>" for h in heading) + f"</tr>{cells}</table>"]
            good = [(n, table[scenario.name, n]) for n in alternatives
                    if "own_us" in table.get((scenario.name, n), {})]
            body.append(bars("Own CPU a message", "µs", [(n, r["own_us"]) for n, r in good if n not in ("direct", "nftables")]))
            body.append(bars("99th percentile from when a message was due", "µs",
                             [(n, r["p99_us"]) for n, r in good]))
    parts = [of_frames(frames)] if frames else []
    if functional[1]:
        parts.append(table_of("The prototype's tests", "Messages at their group's brokers, once.", *functional))
    for more, page in parts:
        md += more
        body += page
    if points:
        more, plots = growth(points)
        md += more
        body += plots
    md += ["## Alternatives", ""] + [f"- **{n}**: {about}" for n, (_, about) in alternatives.items()]
    md += ["", "## How to read it", ""] + [f"- {line}" for line in reading]
    with open(f"{out}/report.md", "w") as file:
        file.write("\n".join(md) + "\n")
    emphasised = [re.sub(r"[*](.+?)[*]", r"<i>\1</i>", line) for line in reading]
    items = "".join(f"<li><b>{n}</b>: {about}</li>" for n, (_, about) in alternatives.items())
    with open(f"{out}/report.html", "w") as file:
        file.write("<!doctype html><meta charset=utf-8><title>mqtt-fwd measured</title><style>"
                   "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
                   "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:3px 9px;"
                   "text-align:right}td:first-child{text-align:left}th{background:#f0f2f5}svg{display:block}"
                   "</style><h1>mqtt-fwd beside what one would use instead</h1>" + "\n".join(body)
                   + f"<h2>Alternatives</h2><ul>{items}</ul><h2>How to read it</h2><ul>"
                   + "".join(f"<li>{line}</li>" for line in emphasised) + "</ul>")
