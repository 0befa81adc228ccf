"""The page: whole, escaped, without a way out, for runs of every kind."""

from __future__ import annotations

import copy
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from run_files import png, round_line, write_alone, write_evaluation, write_run

from flap_nvflare.cli import main
from flap_nvflare.report.compare import differences, render_runs
from flap_nvflare.report.page import render_run
from flap_nvflare.report.read import read_run
from flap_nvflare.report.summary import summary

SITES = ["A", "B", "C"]
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Checks that every tag is closed in its order; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len({name for name, _ in attrs}), f"{tag}: an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check(text: str) -> Reader:
    """Well-formed, and nothing in it asks for anything outside it."""
    page = Reader(text)
    assert text.startswith("<!doctype html>")
    ids = [values["id"] for _, values in page.tags if "id" in values]
    assert len(ids) == len(set(ids))
    for tag, values in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base", "a"}
        assert not any(name.startswith("on") for name in values)
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert name not in values or str(values[name]).startswith("data:image/png;base64,")
    style = "".join(re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL))
    assert not re.search(r"(?i)url\(|@import", style)
    policy = next(v for t, v in page.tags if v.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])
    return page


def every_kind(folder: Path) -> dict[str, Path]:
    """Runs of all kinds."""
    kinds = {
        "whole": write_run(folder / "whole", SITES),
        "one site": write_run(folder / "one", ["A"], rounds=1),
        "many sites": write_run(folder / "many", [f"site-{i}" for i in range(100)], rounds=2),
        "killed": write_run(folder / "killed", SITES, finished=False),
        "not begun": write_run(folder / "begun", SITES, lines=[], finished=False, data="unknown"),
        "alone": write_alone(folder / "alone"),
        "alone, killed": write_alone(folder / "alone_killed", finished=False),
    }
    with (kinds["killed"] / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "sec')
    lines = [round_line(index, SITES, aggregation_error=None) for index in range(3)]
    kinds["encrypted"] = write_run(folder / "he", SITES, lines=lines, settings={"encryption": "he"})
    kinds["personal"] = write_run(folder / "personal", SITES, settings={"personal": "head"})
    lines = [round_line(index, SITES) for index in range(2)]
    for line in lines:
        for site in SITES:
            line["sites"][site]["privacy"] = {
                "clip": 0.5, "noise": 1.0, "releases": 2, "delta": 1e-5,
                "epsilon_replace": 12.34, "epsilon_zero_out": None, "secret": site != "B",
            }  # fmt: skip
    kinds["private"] = write_run(folder / "dp", SITES, lines=lines)
    kinds["evaluated"] = write_run(folder / "evaluated", SITES)
    write_evaluation(kinds["evaluated"], SITES, pictures=2)
    refused = [{"site": "C", "round": 1, "key": "", "reason": "ran out of memory"}]
    lines = [round_line(index, SITES[:2], refused=refused, missing=["D"]) for index in range(2)]
    kinds["refused"] = write_run(folder / "refused", [*SITES, "D"], lines=lines)
    return kinds


def test_a_page_of_every_kind_of_run(tmp_path: Path) -> None:
    pages = {}
    for name, folder in every_kind(tmp_path).items():
        pages[name] = check(render_run(read_run(folder)))
    texts = {name: page.text for name, page in pages.items()}
    for name, text in texts.items():
        first = text.split("</title>")[-1]
        assert ("SYNTHETIC" in first) == (name not in {"not begun", "alone", "alone, killed"}), name
    assert "broken off" in texts["killed"]
    assert "4 of 4 rounds stand" in texts["killed"]
    assert "cannot read encrypted updates" in texts["encrypted"]
    assert "Aggregation error by round" not in texts["encrypted"]
    assert "personal: head" in texts["personal"]
    assert "12.3" in texts["private"]
    assert "The noise of B is drawn from a known seed: it protects NOTHING" in texts["private"]
    assert "Why a run stops is in the server" in texts["killed"]
    assert "ran out of memory" in texts["refused"]
    assert "2 without an answer" in texts["refused"]
    assert "98 other sites" in texts["many sites"]
    assert "0.600 (0.550\N{EN DASH}0.650)" in texts["evaluated"]
    assert "+0.030" in texts["evaluated"]
    assert "Federations without a site" in texts["evaluated"]
    assert "Scores are of the adapter of round 3." in texts["evaluated"]
    assert "NSD with a tolerance of 2 mm" in texts["evaluated"]
    # Of a site no tumour was found; a mean of the classes would hide it.
    assert "12.2 / \N{EN DASH}" in texts["evaluated"]
    assert "HD95 is given by class (kidney, tumour)" in texts["evaluated"]
    assert sum(tag == "img" for tag, _ in pages["evaluated"].tags) == 2
    assert "flap-nvflare evaluate RUN" in texts["whole"]
    assert "What travelled" not in texts["alone"]


def test_the_first_line_says_what_the_scans_were(tmp_path: Path) -> None:
    text = render_run(read_run(write_run(tmp_path, ["A"])))
    body = text.split("<body>")[1].strip()
    assert body.startswith('<p class="banner synthetic">The scans of this run are SYNTHETIC')


def test_scores_of_validation_cases_are_called_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A"])
    write_evaluation(folder, ["A"], split="validation")
    text = check(render_run(read_run(folder))).text
    assert "Mean validation Dice" in text
    assert "Mean test Dice" not in text
    assert "2 validation cases" in text


def hostile(folder: Path) -> Path:
    """A run whose every text is a script's."""
    name = f"{EVIL}\"'><img src=x onerror=alert(2)>"
    line = round_line(0, [name, "B"], missing=[name], excluded=[EVIL])
    line["refused"] = [{"site": EVIL, "round": 0, "key": EVIL, "reason": name}]
    line["sites"][name]["privacy"] = {"epsilon_replace": EVIL, "secret": False}
    settings = {name: EVIL, "class_names": [name, "kidney"], "rule": EVIL, "method": EVIL}
    write_run(
        folder, [name, "B"], lines=[line], settings=settings,
        run=EVIL, versions={EVIL: EVIL}, base_sha256=name, seed=EVIL,
    )  # fmt: skip
    write_evaluation(folder, [name, "B"], pictures=0)
    values = json.loads((folder / "evaluation.json").read_text())
    values["models"][name] = values["models"].pop("pooled") | {"kind": EVIL}
    values["collaborative_gain"]["model"] = EVIL
    (folder / "pictures" / "evil.png").write_bytes(png(3, 1))
    values["pictures"] = [
        {"file": "pictures/evil.png", "site": EVIL, "case": name, "slice": EVIL, "model": EVIL},
        {"file": f"pictures/{EVIL}.png"},
    ]
    (folder / "evaluation.json").write_text(json.dumps(values))
    return folder


def test_every_text_of_a_stranger_is_text_on_the_page(tmp_path: Path) -> None:
    run = read_run(hostile(tmp_path / "evil"))
    for text in (render_run(run), render_runs([run, read_run(write_run(tmp_path / "b", ["B"]))])):
        page = check(text)
        assert "<script" not in text
        assert EVIL in page.text  # it is there to read
        assert not any(values.get("src") == "x" for _, values in page.tags)


def test_long_names_are_cut(tmp_path: Path) -> None:
    long = "hospital-of-the-holy-and-undivided-trinity-in-the-valley"
    page = check(render_run(read_run(write_run(tmp_path, [long, "B"]))))
    assert long not in page.text
    assert long[:20] in page.text


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "pictures/page.png", "\0"])
def test_pictures_come_from_the_runs_folder_and_are_png(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", SITES)
    write_evaluation(folder, SITES, pictures=0)
    (tmp_path / "secret.png").write_bytes(png(2, 2))
    (folder / "pictures" / "page.png").write_text("<svg onload=alert(1)>")
    values = json.loads((folder / "evaluation.json").read_text())
    values["pictures"] = [{"file": name, "site": "A", "case": "1", "slice": 1, "model": "best"}]
    (folder / "evaluation.json").write_text(json.dumps(values))
    page = check(render_run(read_run(folder)))
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "no PNG of at most 4 MB" in page.text


JUNK: list[Any] = [
    None,
    True,
    -1,
    1e308,
    "text",
    [],
    {},
    [[]],
    {"mean": []},
    [{"site": 3}],
    "9" * 5000,
]


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside."""
    inner: Any = []
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = enumerate(value)
    return [way, *(place for key, one in inner for place in places(one, (*way, key)))]


@pytest.mark.parametrize("name", ["rounds.jsonl", "run.json", "cross_site.json", "evaluation.json"])
def test_junk_anywhere_leaves_a_page(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path, ["A", "B"], rounds=2)
    write_evaluation(folder, ["A", "B"], pictures=1)
    path = folder / name
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    draw = random.Random(name)
    for _ in range(25):
        changed = copy.deepcopy(whole)
        for _ in range(3):
            way = draw.choice([place for place in places(changed) if len(place) > 1])
            target: Any = changed
            for key in way[:-1]:
                target = target[key]
            target[way[-1]] = draw.choice(JUNK)
        path.write_text("\n".join(json.dumps(line) for line in changed))
        check(render_run(read_run(folder)))
        json.dumps(summary(read_run(folder)), allow_nan=False)


def test_figures_out_of_range_and_nan_leave_a_page_and_json(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ["A", "B"], settings={"encryption": float("nan")})
    write_evaluation(folder, ["A", "B"])
    values = json.loads((folder / "evaluation.json").read_text())
    for model in values["models"].values():
        model["summary"]["dice"]["mean"] = {"mean": 5.0, "low": 4.0, "high": 6.0}
    values["collaborative_gain"]["mean"] = float("nan")
    (folder / "evaluation.json").write_text(json.dumps(values))
    run = read_run(folder)
    check(render_run(run))
    said = json.loads(json.dumps(summary(run), allow_nan=False))
    assert said["collaborative_gain"] is None


def test_a_comparison_says_what_differs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", SITES, run="kits/1")
    second = write_run(
        tmp_path / "b", SITES, run="kits/2", settings={"rank": 4, "upload": ["int4"]},
        data="sites' own", versions={"torch": "2.9.0"},
    )  # fmt: skip
    runs = [read_run(first), read_run(second)]
    found = dict(differences(runs))
    assert found["rank"] == ["8", "4"]
    assert found["upload"] == ["\N{EN DASH}", "int4"]
    assert found["version of torch"] == ["2.13.0", "2.9.0"]
    assert "rule" not in found
    page = check(render_runs(runs))
    assert "kits/1" in page.text
    assert "Validation Dice, mean of sites" in page.text
    alike = check(render_runs([runs[0], runs[0]]))
    assert "Nothing: settings, scans" in alike.text
    assert f"{len(runs[0].federation) - 2} other settings are the same" in page.text
    assert "1 kits/1" in alike.text  # two of one name are told apart


def test_the_command_writes_a_page_and_prints_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "run", SITES)
    assert main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    check((folder / "report.html").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--compare", str(folder), str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["report"] == "compare.html"
    assert [one["rounds_finished"] for one in said["runs"]] == [4, 4]
    assert (tmp_path / "compare.html").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command_fails_with_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flap-nvflare report: ")
    assert error.count("\n") == 1
    assert main(["report", "--compare", str(tmp_path)]) == 1
    assert "two or more" in capsys.readouterr().err
    folder = write_run(tmp_path / "run", ["A"])
    for out in (tmp_path, tmp_path / "none" / "page.html"):
        assert main(["report", str(folder), "--out", str(out)]) == 1
        assert f"report: {out}: cannot be written" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_only_its_owner_may_read_a_page_with_pictures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["A"])
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_mode & 0o077
    write_evaluation(folder, ["A"], pictures=1)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").stat().st_mode & 0o777 == 0o600
