from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import ROOT
from training import __main__ as commands
from training import goals, raw, results, svg, tables
from training.config import ResultsConfig, parse
from training.folders import DataError

COMMITTED = ROOT / "training"


def ours(**given: Any) -> dict[str, Any]:
    """One measured accuracy, as `evaluate --json-out` writes it."""
    line = {
        "experiment": "accuracy",
        "data": "flowers",
        "split": "test",
        "method": "ridge",
        "way": 5,
        "shot": 1,
        "accuracy": 61.5,
        "interval": 0.4,
        "episodes": 2000,
        "queries": 15,
        "seed": 7,
        "precision": "float32",
        "artifact": "small",
        "labels": "none",
        "trained_on": "flowers (train)",
        "training_seed": 0,
        "seconds": 90,
        "rotations": False,
        "default": True,
        "command": "python -m training evaluate --artifact small --data DATA/flowers",
    }
    return line | given


def theirs(**given: Any) -> dict[str, Any]:
    line = {"experiment": "accuracy", "data": "flowers", "labels": "none", "method": "Theirs", "backbone": "Conv-4"}
    line |= {"mode": "inductive", "way": 5, "shot": 1, "accuracy": 60.0, "interval": None}
    return line | {"certainty": "published", "source": "their paper"} | given


def made(folder: Path, lines: list[dict[str, Any]], **files: list[dict[str, Any]]) -> str:
    """The page that the command writes of these lines."""
    for name, some in {"a": lines, **files}.items():
        raw.append(folder / "raw" / f"{name}.jsonl", some)
    path = results.main(ResultsConfig(raw=folder / "raw", out=folder / "out"))
    return path.read_text()


def part(text: str, title: str) -> str:
    """What stands under a heading of the second order."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.mark.slow
def test_the_committed_page_is_what_the_raw_results_give(tmp_path: Path) -> None:
    results.main(ResultsConfig(raw=COMMITTED / "results", out=tmp_path))
    again = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kept = [COMMITTED / "RESULTS.md", *(COMMITTED / "results").glob("*.svg")]
    assert again == {path.relative_to(COMMITTED).as_posix(): path.read_bytes() for path in kept}, (
        "python -m training results makes it again"
    )
    assert len(again) > 1


def test_every_picture_of_the_page_is_there_and_every_row_of_ours_names_a_command() -> None:
    text = (COMMITTED / "RESULTS.md").read_text()
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (COMMITTED / picture).exists(), picture
    commands = {int(number) for number in re.findall(r"^(\d+)\. `", part(text, "Commands"), re.MULTILINE)}
    named = {int(number) for number in re.findall(r"\[(\d+)\]\(#commands\)", text)}
    assert named == commands
    for line in text.splitlines():
        if re.match(r"\| \*\*`", line):
            assert "(#commands)" in line, line


def test_label_free_results_stand_apart_from_those_with_labels(tmp_path: Path) -> None:
    lines = [ours(), ours(labels="training classes", accuracy=71.25, artifact="big")]
    text = made(tmp_path, lines, published=[theirs(), theirs(method="Labelled", labels="training classes")])
    without = part(text, "Without labels of the training classes")
    labelled = part(text, "With labels of the training classes")
    assert "61.50 ± 0.40" in without
    assert "Theirs (Conv-4)" in without
    assert "71.25" not in without
    assert "Labelled" not in without
    assert "71.25 ± 0.40" in labelled
    assert "Labelled (Conv-4)" in labelled


def test_what_is_from_memory_is_never_called_published(tmp_path: Path) -> None:
    memory = theirs(method="Remembered", certainty="from memory", source="", accuracy=66.6)
    mixed = theirs(method="Mixed", shot=5, certainty="from memory", source="", accuracy=77.7)
    shifted = theirs(method="Shifted", mode="transductive")
    others = [memory, theirs(method="Mixed"), mixed, shifted]
    text = part(made(tmp_path, [ours(), ours(shot=5)], published=others), "Without labels of the training classes")
    rows = {line.split(" (")[0][2:]: line for line in text.splitlines() if "Conv-4" in line}
    assert rows["Remembered"].endswith("| 66.60 † | – | from memory |")
    assert rows["Mixed"].endswith("| 60.00 | 77.70 † | published: their paper |")
    assert "**transductive**" in rows["Shifted"]
    assert "**transductive**" not in rows["Mixed"]
    assert "† from memory, not checked" in text


def test_several_seeds_are_a_mean_and_each(tmp_path: Path) -> None:
    lines = [ours(training_seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((60.0, 61.0, 62.0))]
    text = made(tmp_path, lines)
    assert "61.00 ± 2.48 (60.00, 61.00, 62.00)" in text  # 4.30 / 3 ** 0.5
    assert "training seed 0 or 1 or 2" in text


def test_seeds_for_which_another_number_of_steps_fitted_into_the_time_are_one_row(tmp_path: Path) -> None:
    same = {
        "experiment": "objectives",
        "labels": "none",
        "way": 5,
        "shot": 1,
        "method": "uniform",
        "command": "python x",
    }
    lines = [{**same, "seed": seed, "accuracy": 60.0 + seed, "steps": 1000 + 10 * seed} for seed in range(3)]
    table = part(made(tmp_path, lines), "Objectives")
    assert "| 5-way 1-shot | uniform | 61.00 ± 2.48 (60.00, 61.00, 62.00) | 1,010 |" in table


def test_a_task_that_has_a_name_is_called_by_it(tmp_path: Path) -> None:
    line = {"experiment": "pretext", "labels": "none", "task": "jigsaw-3x3", "way": 8, "shot": 10, "accuracy": 41.0}
    assert "jigsaw-3x3" in made(tmp_path, [line | {"method": "random", "command": "python x"}])


def test_of_the_same_measurement_the_one_with_most_episodes_counts(tmp_path: Path) -> None:
    text = made(tmp_path, [ours(episodes=10_000, accuracy=62.22), ours(), ours(method="lstm", accuracy=1.0)])
    assert "62.22" in text
    assert "61.50" not in text


def test_an_unknown_experiment_is_a_plain_table(tmp_path: Path) -> None:
    common = {"experiment": "arms", "labels": "none", "data": "flowers", "command": "python -m training arms"}
    lines = [
        ours(),
        {**common, "arm": "uniform", "accuracy": 50.0, "interval": 0.5, "gain": 0.0, "gain_interval": 0.1, "steps": 9},
        {
            **common,
            "arm": "learned | all",
            "accuracy": 49.0,
            "interval": 0.5,
            "gain": -1.0,
            "gain_interval": 0.2,
            "steps": 9,
        },
    ]
    text = part(made(tmp_path, lines), "Arms")
    assert "For every row: data flowers, steps 9." in text
    assert "| arm | accuracy | gain | command |" in text
    assert "| uniform | 50.00 ± 0.50 | 0.00 ± 0.10 |" in text
    assert r"| learned \| all | 49.00 ± 0.50 | -1.00 ± 0.20 |" in text


@pytest.mark.parametrize(
    ("bounds", "value", "width", "said"),
    [
        ({"least": 60}, 61.5, 0.4, "yes"),
        ({"least": 61.4}, 61.5, 0.4, "yes, within the interval of the aim"),
        ({"least": 61.7}, 61.5, 0.4, "no, by 0.20 (within the interval)"),
        ({"least": 70}, 61.5, 0.4, "no, by 8.50"),
        ({"most": 6.5}, 8.3, 0.3, "no, by 1.80"),
        ({"least": 3.5, "most": 6.5}, 5.1, 0.2, "yes"),
        ({"least": 3.5, "most": 6.5}, 1.5, 0.1, "no, by 2.00"),
    ],
)
def test_a_goal_is_reached_or_missed_by_so_much(
    bounds: dict[str, float], value: float, width: float, said: str
) -> None:
    goal = {"goal": "M", "text": "t", **bounds, "where": {"way": 5}, "field": "accuracy"}
    table = goals.goals_table([goal], [ours(accuracy=value, interval=width)], tables.Commands())
    assert table.splitlines()[-1].split(" | ")[5] == said


def test_figures_of_spread_examples_stand_apart(tmp_path: Path) -> None:
    lines = [ours(shot=5, accuracy=30.0), ours(shot=5, accuracy=39.0, spread=True)]
    aim = {"goal": "M", "text": "t", "least": 35, "where": {"way": 5}, "field": "accuracy"}
    assert "30.00 ± 0.40 | 2,000 | no" in goals.goals_table([aim], lines, tables.Commands())
    text = made(tmp_path, lines)
    assert "artifact `small`, examples of different things\n" in text
    assert "39.00 ± 0.40" in text


def test_what_was_seen_in_several_views_stands_apart_and_answers_no_goal_that_does_not_say_so(tmp_path: Path) -> None:
    lines = [ours(shot=10, accuracy=79.0), ours(shot=10, accuracy=82.0, views=3)]
    aims = [
        {"goal": "M", "text": "t", "least": 80, "where": {"way": 5} | more, "field": "accuracy"}
        for more in ({}, {"views": 3})
    ]
    one, three = goals.goals_table(aims, lines, tables.Commands()).splitlines()[-2:]
    assert "79.00 ± 0.40 | 2,000 | no" in one
    assert "82.00 ± 0.40 | 2,000 | yes" in three
    text = made(tmp_path, lines)
    assert "| `small`, 3 views an image | none | 82.00 ± 0.40 |" in part(text, "Ten samples")
    assert "artifact `small`, 3 views an image\n" in text


def test_a_goal_without_a_result_is_not_measured() -> None:
    far = {"goal": "M", "text": "t", "least": 1, "where": {"way": 99}, "field": "accuracy"}
    nothing_beside = {**far, "where": {"way": 5}, "less": {"way": 99}}
    for goal in (far, nothing_beside):
        assert "| not measured |" in goals.goals_table([goal], [ours()], tables.Commands())


@pytest.mark.parametrize(
    ("name", "told"), [("less", "| 5.00 (mean of 2 seeds) |"), ("over", "| 1.07 (mean of 2 seeds) |")]
)
def test_a_goal_may_be_a_difference_or_a_ratio_of_two_results(name: str, told: str) -> None:
    lines = [
        *(ours(training_seed=seed, accuracy=accuracy) for seed, accuracy in ((0, 79.0), (1, 81.0))),
        ours(method="lstm", accuracy=75.0),
    ]
    where, other = {"method": ours()["method"]}, {"method": "lstm"}
    goal = {"goal": "M", "text": "t", "least": 1, "where": where, name: other, "field": "accuracy"}
    assert f"{told} 2,000 | yes |" in goals.goals_table([goal], lines, tables.Commands())


def test_ten_samples_have_four_readings_and_say_which_was_proved(tmp_path: Path) -> None:
    lines = [
        ours(shot=10, accuracy=84.0),
        ours(way=10, accuracy=80.1),
        ours(way=2, shot=5, accuracy=91.0, default=False),
    ]
    text = part(made(tmp_path, lines), "Ten samples")
    assert [line[2:5] for line in text.splitlines() if line.startswith("| (")] == ["(a)", "(b)", "(c)", "(d)"]
    assert "| 84.00 ± 0.40 | 2,000 | yes |" in text
    assert "| 80.10 ± 0.40 | 2,000 | no, -0.1 short |" not in text
    assert "| 80.10 ± 0.40 | 2,000 | within the interval |" in text
    assert text.count("not measured") == 2


def test_curves_are_drawn_of_settings_with_enough_shots(tmp_path: Path) -> None:
    lines = [ours(shot=shot, accuracy=50.0 + shot, method=m) for shot in (1, 2, 5, 20) for m in ("a<b", "ridge")]
    lines.append(ours(method="once"))
    text = made(tmp_path, lines)
    (name,) = [path.name for path in (tmp_path / "out" / "results").glob("curve*.svg")]
    assert f"](results/{name})" in text
    picture = (tmp_path / "out" / "results" / name).read_text()
    names = [node.text for node in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b", "ridge", "1", "2", "5", "20"} <= set(names)
    assert "once" not in names
    raw.append(tmp_path / "raw" / "a.jsonl", [])
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps(ours()) + "\n")
    results.main(ResultsConfig(raw=tmp_path / "raw", out=tmp_path / "out"))
    assert not list((tmp_path / "out" / "results").glob("curve*.svg"))  # what is drawn no more is gone


def contrast(one: str, other: str) -> float:
    """How far apart two colours are in brightness, as WCAG 2 counts it: 1 to 21."""

    def bright(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((bright(one), bright(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("shade", [0, 1], ids=["light", "dark"])
def test_lines_and_words_are_legible_on_their_ground(shade: int) -> None:
    picture = svg.curves("t", [svg.Curve("a", ((1, 50, 1), (5, 60, 1)))], x="x", y="y")
    rules = picture.split("@media (prefers-color-scheme:dark)")[shade]
    (ground,) = re.findall(r"\.ground\{fill:(#\w{6})\}", rules)
    inks = re.findall(r"(?:text|\.quiet)\{fill:(#\w{6})\}", rules)
    assert len(inks) == 2
    assert all(contrast(ink, ground) >= 4.5 for ink in [*inks, *(pair[shade] for pair in svg.COLOURS)])


def test_names_at_the_ends_of_curves_do_not_cover_each_other() -> None:
    found = [svg.Curve(f"m{k}", ((1, 50, 0.1), (5, 60 + k / 100, 0.1))) for k in range(5)]
    tree = ET.fromstring(svg.curves("t", found, x="x", y="y"))
    places = [
        float(n.get("y", 0)) for n in tree.iter("{http://www.w3.org/2000/svg}text") if (n.text or "").startswith("m")
    ]
    assert len(places) == 5
    assert min(b - a for a, b in zip(sorted(places), sorted(places)[1:], strict=False)) >= 15.9


def test_what_is_no_raw_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no raw results"):
        results.load(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"experiment": "x"}\n\n[1]\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not a JSON object"):
        results.load(tmp_path)


def test_every_command_of_the_committed_lines_is_one_that_its_program_takes() -> None:
    """But for those that say that there is none."""
    lines, _, _ = results.load(Path(results.__file__).parent / "results")
    asked = {str(line["command"]) for line in lines}
    for command in asked:
        program, *words = shlex.split(command)
        if program == "none:":
            continue
        if program == "bash":
            assert f"{words[1]}() {{" in (ROOT / words[0]).read_text(), command
        elif words[0] == "-m":
            kind, _ = commands.COMMANDS[words[2]]
            parse(kind, words[3:], prog=command)
        else:
            script = (ROOT / words[0]).read_text()
            flags = [word.removeprefix("--") for word in words if word.startswith("--")]
            assert all(f'"{flag}"' in script or f'"--{flag}"' in script for flag in flags), command
    assert sum(command.startswith("python -m training evaluate") for command in asked) > 40


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((98.0, 99.0, 100.0), "| 99.00 ± 2.48 (mean of 3 seeds) | 2,000 | yes, within the interval of the aim |"),
        ((97.0, 98.0, 99.0), "| 98.00 ± 2.48 (mean of 3 seeds) | 2,000 | no, by 0.50 (within the interval) |"),
        ((99.0, 99.1, 99.2), "| 99.10 ± 0.25 (mean of 3 seeds) | 2,000 | yes |"),
    ],
)
def test_a_goal_over_seeds_is_judged_with_their_interval(values: tuple[float, ...], told: str) -> None:
    lines = [ours(training_seed=seed, accuracy=value) for seed, value in enumerate(values)]
    goal = {"goal": "M", "text": "t", "least": 98.5, "where": {"way": 5}, "field": "accuracy"}
    assert told in goals.goals_table([goal], lines, tables.Commands())


def test_a_difference_over_seeds_is_paired_by_them() -> None:
    lines = [
        *(ours(training_seed=seed, accuracy=value) for seed, value in enumerate((60.0, 70.0, 80.0))),
        *(ours(training_seed=seed, accuracy=value, method="lstm") for seed, value in enumerate((58.0, 69.0, 77.0))),
    ]
    where, other = {"method": ours()["method"]}, {"method": "lstm"}
    goal = {"goal": "M", "text": "t", "least": 3, "where": where, "less": other, "field": "accuracy"}
    told = "| 2.00 ± 2.48 (mean of 3 seeds) | 2,000 | no, by 1.00 (within the interval) |"
    assert told in goals.goals_table([goal], lines, tables.Commands())
