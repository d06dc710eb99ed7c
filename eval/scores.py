"""What a scorer returns: one number with its interval, further numbers, breakdowns, and a score for each question."""

from dataclasses import dataclass, field

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass
class Scores:
    """The result of one benchmark.

    Args:
        metric: name of `value`.
        value: the number that papers print.
        interval: bootstrap interval of `value`, (low, high).
        values: further numbers by name.
        groups: {breakdown: {group: {"questions": n, "score": x, ...}}}.
        points: score of each question, in the order of the questions, None for those that do not count.
        counted: how many questions `value` is about; None: all.
        unit: what the bootstrap draws.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    values: dict[str, float] = field(default_factory=dict)
    groups: dict[str, dict[str, dict]] = field(default_factory=dict)
    points: list[float | None] = field(default_factory=list)
    counted: int | None = None
    unit: str = "questions"


def bootstrap(rows, statistic, seed=0):
    """Percentile interval of a statistic of totals.

    Args:
        rows: (n, k), what each of n units (questions, or pictures with their questions) adds to k totals.
        statistic: takes totals (m, k) and returns (m,).
        seed: equal seeds, equal intervals.

    Returns:
        (low, high), between which the statistic of 95 % of the resamples lies.
    """
    # Units that add the same are interchangeable: drawing how often each kind occurs is the same as drawing units.
    kinds, counts = np.unique(np.asarray(rows, dtype=float), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), size=RESAMPLES)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(statistic(draws @ kinds), [tail, 100 - tail])
    return float(low), float(high)


def ratio(over, under):
    """over / under, 0 where nothing is to be divided by; numbers or arrays."""
    over, under = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
    return np.divide(over, under, out=np.zeros(np.broadcast(over, under).shape), where=under != 0)


def mean_scores(metric, points, answers, breakdowns=None, counted=None, seed=0):
    """Scores that are means over questions, in percent.

    Args:
        metric: name of the main number.
        points: score of each question, 0 to 1.
        answers: text of each question's prediction, None where there is none.
        breakdowns: {title: for each question the name of its group, or a tuple of names}.
        counted: for each question whether the main number counts it; by default all are.
        seed: of the bootstrap.
    """
    points = np.asarray(points, dtype=float)
    inside = np.ones(len(points), bool) if counted is None else np.asarray(counted, bool)
    done = inside & np.asarray([answer is not None for answer in answers], bool)
    rows = np.stack([points * inside, inside], 1)
    return Scores(
        metric=metric,
        value=100 * float(ratio(points[inside].sum(), inside.sum())),
        interval=bootstrap(rows, lambda totals: 100 * ratio(totals[:, 0], totals[:, 1]), seed),
        values={}
        if (done == inside).all()
        else {f"{metric} of the answered": 100 * float(ratio(points[done].sum(), done.sum()))},
        groups={title: group_means(points, names) for title, names in (breakdowns or {}).items()},
        points=[float(point) for point in points],
        counted=int(inside.sum()),
    )


def group_means(points, names):
    """{group: {"questions": n, "score": mean in percent}}, in order of appearance."""
    groups: dict[str, list] = {}
    for point, name in zip(points, names, strict=True):
        for one in name if isinstance(name, tuple) else (name,):
            groups.setdefault(str(one), []).append(point)
    return {
        name: {"questions": len(members), "score": 100 * float(np.mean(members))} for name, members in groups.items()
    }


def rounded(value, places=6):
    """The same structure with floats rounded, for printing as JSON."""
    if isinstance(value, dict):
        return {key: rounded(item, places) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, places) for item in value]
    return round(value, places) if isinstance(value, float) else value


def table(result):
    """The JSON object of a score as a table for people."""
    low, high = result["interval"]
    protocol = result["protocol"]
    lines = [f"{result['title']}, {result['split']}; protocol {protocol['name']}: {protocol['rule']}"]
    if protocol.get("run"):
        lines.append("run: " + ", ".join(f"{name} {value}" for name, value in protocol["run"].items()))
    if protocol["note"]:
        lines.append(protocol["note"])
    missing = result["missing"]
    note = f", {missing} missing (counted as wrong)" if missing else ""
    counted = "" if result["counted"] == result["questions"] else f"{result['counted']} counted of "
    width = max(map(len, [result["metric"], *result["scores"]]))
    lines.append(
        f"{result['metric']:{width}}  {result['score']:8.2f}   95 % interval {low:.2f} to {high:.2f}   "
        f"{counted}{result['questions']} questions{note}"
    )
    lines += [f"{name:{width}}  {value:8.2f}" for name, value in result["scores"].items()]
    for title, groups in result["breakdown"].items():
        columns = list(next(iter(groups.values()))) if groups else []
        width = max([len(title), *map(len, groups)])
        lines += ["", f"{title:{width}}" + "".join(f"  {column:>9}" for column in columns)]
        for name, numbers in groups.items():
            cells = (f"{x:9.2f}" if isinstance(x, float) else f"{x:9}" for x in numbers.values())
            lines.append(f"{name:{width}}  " + "  ".join(cells))
    return "\n".join(lines)
