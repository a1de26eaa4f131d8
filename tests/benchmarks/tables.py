"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Cells = Sequence[str]


def table(head: Sequence[str], rows: Iterable[Cells], *, texts: int = 1) -> str:
    """A Markdown table; the columns after the first ``texts`` are aligned to the right."""
    rule = ["---" if i < texts else "--:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)) + "\n"


def number(value: float) -> str:
    """Three significant digits, thousands set apart, no exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.4f}"


def mebibytes(value: float | None) -> str:
    """Whole ones, or one decimal of few."""
    if value is None:
        return ""
    return f"{value / 2**20:,.0f} MiB" if value >= 10 * 2**20 else f"{value / 2**20:.1f} MiB"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def optional(row: dict[str, Any], key: str, shown: Callable[[float], str]) -> str:
    return "" if row.get(key) is None else shown(row[key])


def seconds(spread: dict[str, Any]) -> str:
    """Median, and the span where there are several runs."""
    if spread["runs"] < 2:
        return number(spread["median"])
    return f"{number(spread['median'])} ({number(spread['min'])}–{number(spread['max'])})"


def whole_table(rows: Sequence[dict[str, Any]]) -> str:
    """Whole merges."""
    head = ["", "", "seconds (min–max)", "× ours", "processor s", "busy", "memory", "read", "written", "of the limit"]
    models = [row["model"] for row in rows]
    ordered = sorted(rows, key=lambda row: (models.index(row["model"]), row["who"] == "limit"))
    return table(head, (_whole(row) for row in ordered), texts=2)


def _whole(row: dict[str, Any]) -> Cells:
    mark = " ¹" if row.get("extrapolated") else ""
    return (
        row["model"],
        f"**{row['name']}**" if row["who"] == "ours" else row["name"],
        seconds(row["seconds"]) + mark,
        optional(row, "ratio", number),
        optional(row, "cpu_seconds", number),
        percent(row.get("utilisation")),
        mebibytes(row.get("peak_bytes")),
        mebibytes(row.get("bytes_read")),
        mebibytes(row.get("bytes_written")),
        percent(row.get("limit_share")),
    )


def module_table(rows: Sequence[dict[str, Any]]) -> str:
    """Single modules, one line for each peer."""
    head = ["module", "inputs", "", "seconds", "energy kept", "peer", "seconds", "processor s", "×", "× in processor s"]
    cells = [line for row in rows for line in _module(row)]
    return table(head, cells, texts=3)


def _module(row: dict[str, Any]) -> list[Cells]:
    shape = " × ".join(map(str, row["shape"]))
    mine = (
        shape,
        str(row["inputs"]),
        f"**{row['name']}**",
        number(row["wall_seconds"]),
        f"{row['kept_energy']:.2%}".replace("%", " %"),
    )
    if not row.get("peers"):
        return [(*mine, "", "", "", "", "")]
    return [
        (
            *mine,
            name,
            number(p["seconds"]) + (" ¹" if p["extrapolated"] else ""),
            number(p["cpu_seconds"]),
            number(p["ratio"]),
            number(p["cpu_ratio"]),
        )
        for name, p in row["peers"].items()
    ]


def growth_table(curves: Sequence[dict[str, Any]]) -> str:
    """Fitted exponents, and both ends of each curve."""
    head = ["", "axis", "from–to", "seconds", "exponent", "last step", "memory"]
    return table(head, (_curve(curve) for curve in curves), texts=3)


def _curve(curve: dict[str, Any]) -> Cells:
    values, times, peaks = curve["values"], curve["seconds"], curve["peak_bytes"]
    return (
        curve["name"],
        curve["axis"],
        f"{values[0]}–{values[-1]}",
        f"{number(times[0])}–{number(times[-1])}",
        f"{curve['exponent']:.2f}",
        f"{curve['last_step']:.2f}",
        " ".join(mebibytes(peak).removesuffix(" MiB") for peak in peaks) + (" MiB" if None not in peaks else ""),
    )


def target_table(targets: Sequence[dict[str, Any]]) -> str:
    """What was aimed at."""
    return table(
        ["target", "found", "met"], ((t["target"], t["found"], "yes" if t["met"] else "**no**") for t in targets)
    )


def limit_line(row: dict[str, Any]) -> str:
    """The components of a limit, medians of the runs."""
    runs = row["runs"]
    parts = {name: sorted(run["parts"][name] for run in runs)[len(runs) // 2] for name in runs[0]["parts"]}
    rate = max(run["gemm_flops_per_second"] for run in runs)
    listing = ", ".join(f"{name.replace('_', ' ')} {number(value)} s" for name, value in parts.items())
    return f"{row['model']}: {listing}; arithmetic at {rate / 1e9:.0f} Gflop/s."


def environment_line(environment: dict[str, Any]) -> str:
    """Machine, versions and date."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['processor']}, {environment['processors']} processors, {environment['system']}; {versions}; "
        f"{environment['date']}."
    )


def job_text(name: str, job: dict[str, Any], environment: dict[str, Any]) -> str:
    """The section of a job; its environment where it is not that of the page."""
    parts = [f"### {job['title']}\n"]
    if job["environment"] != environment:
        parts.append(environment_line(job["environment"]) + "\n")
    if job["rows"]:
        parts.append(whole_table(job["rows"]))
    if job["modules"]:
        parts.append(module_table(job["modules"]))
    if job["curves"]:
        parts.append(growth_table(job["curves"]))
    remarks = [*job["remarks"], *(f"Limit, {limit_line(row)}" for row in job["rows"] if row["who"] == "limit")]
    if name != "S8":
        remarks.append(f"Start-up, subtracted from ours: {number(job['startup_seconds'])} s.")
    parts.append("\n".join(f"* {remark}" for remark in remarks) + "\n")
    return "\n".join(parts)


LEGEND = """\
Every figure is of a process of its own with the libraries imported; contenders take turns. *Seconds*: wall time; for
ours from the call of `merge` to its return, the SHA-256 of every source included (peers do not hash), without the
start-up, which is the plan of a one-module recipe. *× ours*: a peer's seconds over ours. *Processor s*: user and
system time of all threads; *busy*: that over wall time, so 200 % is two processors. *Memory*: the peak of anonymous
memory beyond that of the process with the libraries loaded. *Of the limit*: the physical limit over our seconds. The
limit is the time to read the inputs, cast them to float32 and touch them once, to hash them, and to write and flush
the output, on all processors, plus the method's least arithmetic at the rate of a 2048 × 2048 float32 product. Single
modules, reading and saving apart: of ours the median of five in one process after a first, on one thread; of peers one
run, on all processors. ¹ extrapolated: peers from the modules measured, by the operation counts of the SVD; ours in
`delta` from one layer.
"""


def page(results: dict[str, Any]) -> str:
    """All jobs."""
    jobs = dict(sorted(results["jobs"].items()))
    environment = next(iter(jobs.values()))["environment"]
    settings = ", ".join(f"{key} {value}" for key, value in environment["settings"].items() if value is not None)
    head = f"{environment_line(environment)} Settings: {settings}.\n\n{LEGEND}"
    if results["targets"]:
        head += f"\n{target_table(results['targets'])}"
    return "\n".join([head, *(job_text(name, job, environment) for name, job in jobs.items())])
