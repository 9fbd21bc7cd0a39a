"""The tables and pictures of accuracy on frozen episodes: ours and, beside them, what others reached.

Knows nothing of other experiments.
"""

from __future__ import annotations

from collections.abc import Sequence

from training import svg
from training.raw import Line
from training.tables import NOTHING, Commands, fits, half, markdown, over_seeds, shown, task

SETTING = ("data", "split", "rotations", "artifact", "trained_on", "precision", "views", "spread")
# What may differ between two lines of the same measurement, beside what was measured.
FREE = {"episodes", "digest", "weights_digest", "command", "episode_list", "measured_in_s", "seconds", "default"}


def distinct(lines: Sequence[Line]) -> list[Line]:
    """One line of each measurement: of several the one of most episodes, of equal ones the last."""
    best: dict[str, Line] = {}
    for line in lines:
        same = {k: v for k, v in line.items() if k not in FREE and not isinstance(v, float | list | dict)}
        key = repr(sorted(same.items()))
        if key not in best or line.get("episodes", 0) >= best[key].get("episodes", 0):
            best[key] = line
    return list(best.values())


def accuracy_tables(lines: Sequence[Line], others: Sequence[Line], commands: Commands) -> str:
    """For each data set a table a way: learners down, shots across, then the others'."""
    parts = []
    settings: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        settings.setdefault(tuple(shown(line.get(name)) for name in SETTING), []).append(line)
    # What the artifact was trained for comes first, other domains after it.
    for group in sorted(settings.values(), key=lambda group: not at_home(group[0])):
        parts.append(f"### {name_of(group[0])}")
        parts.append(facts(group))
        for way in sorted({line["way"] for line in group}):
            cells = [line for line in group if line["way"] == way]
            beside = [line for line in others if line["data"] == group[0]["data"] and line["way"] == way]
            comparable = group[0]["split"] == "test" and group[0].get("precision", "float32") == "float32"
            comparable = comparable and "views" not in group[0]
            parts.append(_way_table(way, cells, beside if comparable else [], commands))
    if any(line["certainty"] != "published" for line in others):
        parts.append("† from memory, not checked against the source.")
    return "\n\n".join(parts)


def at_home(line: Line) -> bool:
    """Whether it was measured on other classes of the data that the artifact was trained on."""
    return bool(line["data"] == str(line.get("trained_on")).split(" ")[0])


def name_of(line: Line) -> str:
    turned = ", with rotations" if line.get("rotations") else ""
    precision = "" if line.get("precision", "float32") == "float32" else f", {line['precision']}"
    return f"`{line['data']}` ({line['split']} classes{turned}), artifact `{line['artifact']}`{precision}{seen(line)}"


def seen(line: Line) -> str:
    views = f", {line['views']} views an image" if "views" in line else ""
    return views + (", examples of different things" if "spread" in line else "")


def facts(lines: Sequence[Line]) -> str:
    """How much was measured, and of what."""

    def all_of(name: str) -> str:
        return " or ".join(dict.fromkeys(shown(line.get(name)) for line in lines))

    seconds = dict.fromkeys(line.get("seconds") for line in lines)
    clock = " or ".join("not recorded" if value is None else f"{value / 60:,.0f} min" for value in seconds)
    fewer = {f"{line['shot']}-shot {line['queries_mean']:g}": None for line in lines if line.get("queries_mean")}
    asked = f"{all_of('queries')} questions a class"
    if fewer:
        asked += f" (some have fewer; on average {', '.join(fewer)})"
    notes = dict.fromkeys(f" `{line['method']}`: {line['note']}." for line in lines if line.get("note"))
    return (
        f"{all_of('episodes')} episodes (seed {all_of('seed')}), {asked}. Trained on "
        f"{all_of('trained_on')}, training seed {all_of('training_seed')}, wall-clock {clock}.{''.join(notes)}"
    )


def _way_table(way: int, lines: Sequence[Line], others: Sequence[Line], commands: Commands) -> str:
    shots = sorted({line["shot"] for line in lines})
    head = [f"{way}-way", *(f"{shot}-shot" for shot in shots), "source"]
    rows = []
    for method in sorted({str(line["method"]) for line in lines}):
        mine = [line for line in lines if line["method"] == method]
        default = " (default)" if any(line.get("default") for line in mine) else ""
        cells = [_cell([line for line in mine if line["shot"] == shot]) for shot in shots]
        rows.append([f"**`{method}`**{default}", *cells, "ours, " + commands.refer(mine)])
    for name in dict.fromkeys((line["method"], line["backbone"], line["mode"]) for line in others):
        found = [line for line in others if (line["method"], line["backbone"], line["mode"]) == name]
        cells = [_cell([line for line in found if line["shot"] == shot]) for shot in shots]
        if set(cells) != {NOTHING}:
            mode = ", **transductive**" if name[2] == "transductive" else ""
            note = f", {found[0]['note']}" if found[0].get("note") else ""
            rows.append([f"{name[0]} ({name[1]}{note}){mode}", *cells, _source(found)])
    return markdown(head, rows)


def _cell(lines: Sequence[Line]) -> str:
    if not lines:
        return NOTHING
    if len(lines) > 1:
        return over_seeds([float(line["accuracy"]) for line in lines])
    (line,) = lines
    width = half(line, "accuracy")
    mark = " †" if line.get("certainty", "published") != "published" else ""
    return f"{line['accuracy']:.2f}" + ("" if width is None else f" ± {width:.2f}") + mark


def _source(lines: Sequence[Line]) -> str:
    found = dict.fromkeys(line["source"] for line in lines if line["certainty"] == "published")
    return f"published: {'; '.join(found)}" if found else "from memory"


def learning_curves(lines: Sequence[Line], *, least: int = 4) -> dict[str, tuple[str, str]]:
    """A picture for every setting and way with so many shots: file name -> title and SVG."""
    pictures: dict[str, tuple[str, str]] = {}
    settings: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line.get("precision", "float32") == "float32" and not {"views", "spread"} & set(line):
            settings.setdefault((*(shown(line.get(n)) for n in SETTING), f"{line['way']:03d}"), []).append(line)
    for key in sorted(settings):
        group = settings[key]
        shots = {line["shot"] for line in group}
        if len(shots) < least:
            continue
        way, first = group[0]["way"], group[0]
        found = []
        for method in sorted({str(line["method"]) for line in group}):
            points = {
                line["shot"]: (float(line["shot"]), float(line["accuracy"]), half(line, "accuracy") or 0.0)
                for line in group
                if line["method"] == method
            }
            if set(points) == shots:  # a straight line over a gap would look like a measurement
                found.append(svg.Curve(method, tuple(points[shot] for shot in sorted(points))))
        if not found:
            continue
        turned = "-rotations" if first.get("rotations") else ""
        title = f"{first['artifact']} on {first['data']}{turned.replace('-', ' with ')}, {way}-way"
        picture = svg.curves(title, found, x="examples a class (logarithmic)", y="accuracy, %")
        pictures[f"curve-{first['artifact']}-{first['data']}{turned}-{way}way.svg"] = (title, picture)
    return pictures


READINGS = (
    ("a", "5-way, ten examples a class", ((5, 10),)),
    ("b", "ten images in all", ((2, 5), (5, 2), (10, 1))),
)


def ten_samples(lines: Sequence[Line], measured: Sequence[Line], goals: Sequence[Line]) -> tuple[str, dict[str, str]]:
    """The four readings of "80 % from ten samples", as a table and as a picture, by the default learner."""
    head = ["reading", "data", "task", "artifact", "labels", "accuracy", "episodes", "80 % reached"]
    rows, bars = [], []
    for letter, words, cells in READINGS:
        for line in measured:
            if (line["way"], line["shot"]) not in cells or not line.get("default") or line["precision"] != "float32":
                continue
            if not at_home(line):
                continue
            width = half(line, "accuracy") or 0.0
            short = 80 - line["accuracy"]
            unsure = "within the interval" if short < width else f"no, {short:.1f} short"
            turned = ", with rotations" if line.get("rotations") else ""
            rows.append(
                [
                    f"({letter}) {words}",
                    f"{line['data']}{turned}",
                    task(line),
                    f"`{line['artifact']}`{seen(line)}",
                    line["labels"],
                    f"{line['accuracy']:.2f} ± {width:.2f}",
                    shown(line["episodes"]),
                    "yes" if short <= -width else unsure,
                ]
            )
            aims = [
                goal["least"] for goal in goals if "least" in goal and goal.get("where") and fits(line, goal["where"])
            ]
            name = f"({letter}) {line['data']}, {task(line)}, {line['artifact']}{seen(line)}"
            bars.append(svg.Bar(name, line["accuracy"], width, max(aims, default=None)))
    pretext = [line for line in lines if line["experiment"] == "pretext"]
    nothing = [NOTHING] * 4
    found = "see [Pretext](#pretext)" if pretext else "not measured"
    rows.append(["(c) ten images of a self-supervised task never trained on", *nothing, found, NOTHING, NOTHING])
    far = "not measured: out of reach of a small extractor without outside weights"
    rows.append(["(d) ImageNet, 1000-way, ten examples a class", *nothing, far, NOTHING, NOTHING])
    text = (
        'What "80 % from ten samples" can mean, and which reading a number proves. Default learner, test classes; '
        "reached: the lower end of the interval is above 80.\n\n" + markdown(head, rows)
    )
    if not bars:
        return text, {}
    picture = svg.bars("Ten samples: accuracy in per cent, readings (a) and (b)", bars)
    return f"{text}\n\n![Ten samples](results/ten-samples.svg)", {"ten-samples.svg": picture}
