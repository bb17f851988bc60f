"""`tiphys tokens` shows what training will see, in 80 columns, and writes a page that needs nothing else."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

import tests.launch.checks.test_data as driving
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.shards import ShardWriter
from tiphys.launch.cli import main
from tiphys.launch.plan import make_plan, open_datasets
from tiphys.launch.tokens import as_html, as_text, load_row
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.load import load_recipe

NAME = "<b>x</b> [red]"
TASK = TaskSpec(
    NAME,
    (
        FieldSpec("observation.image", "observation", "image", "uint8", (48, 64, 3)),
        FieldSpec("observation.mission", "text", "text", "str", per="episode"),
        FieldSpec("action", "action", "discrete", "int64", values=5),
    ),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Six episodes of 4 steps, and a recipe that trains on them."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    episodes = {}
    with ShardWriter(str(folder / "lift"), [TASK]) as writer:
        for i in range(6):
            fields = {
                "observation.image": rng.integers(0, 256, (4, 48, 64, 3)).astype(np.uint8),
                "observation.mission": "lift <i>it</i>\x1b[31m",
                "action": rng.integers(0, 5, 4),
            }
            episodes[f"e{i}"] = Episode(f"e{i}", NAME, fields, 4)
            writer.write(episodes[f"e{i}"])
    recipe = {
        "name": "lift",
        "data": {
            "mixture": [{"dataset": str(folder / "lift"), "objective": "bc", "loss_weight": 0.5}],
            "validation": 0.0,
        },
        "objectives": {"bc": {"context": 64, "window": 2}},
        "model": {"layers": 1, "hidden": 32, "heads": 2, "text_vocabulary": 300},
        "train": {"steps": 10},
        "deepspeed": {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}},
        "run": {"dir": str(folder / "run")},
    }
    file = folder / "lift.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return str(file), episodes


@pytest.fixture(scope="module")
def row(dataset):
    return load_row(dataset[0], [], 3, 2)


def test_the_row_has_the_windows_of_the_plan_and_the_values_of_their_episodes(dataset, row):
    recipe = load_recipe(dataset[0])
    indexes = open_datasets(recipe)
    planned = make_plan(recipe, indexes, Objectives(recipe, indexes)).windows(3)
    mine = planned.row == 2
    wanted = [
        (indexes[0].id(int(episode)), int(start), int(steps))
        for episode, start, steps in zip(planned.episode[mine], planned.start[mine], planned.units[mine], strict=True)
    ]
    assert [(w.episode, w.start, w.steps) for w in row.windows] == wanted
    assert wanted
    for window in row.windows:
        fields = dataset[1][window.episode].fields
        assert [e.value for e in window.elements if e.what == "action"] == [
            str(a) for a in fields["action"][window.start : window.start + window.steps]
        ]
        for e in window.elements:
            if e.what == "image":
                assert e.value == "12 patches of 16×16"
                assert (e.last - e.first, e.weight) == (11, 0.5)
                assert e.predicted == str(fields["action"][e.step])
                assert np.array_equal(e.picture, fields["observation.image"][e.step])


def test_the_table_has_a_header_for_each_window_and_a_line_for_each_element(row):
    lines = as_text(row, 80).splitlines()
    assert lines[0].startswith(f"step 3, row 2: {row.used} of 64 positions, {len(row.windows)} window")
    text = "\n".join(lines)
    headers = re.findall(
        r"^window \d+: task <b>x</b> \[red\], episode e\d, from step \d, \d steps?; softmax: range$", text, re.M
    )
    assert len(headers) == len(row.windows)
    assert text.count("12 patches of 16×16") == sum(w.steps for w in row.windows)
    assert len(re.findall(r"12 patches of 16×16 +-> \d +0\.5$", text, re.M)) == text.count("12 patches of 16×16")
    elements = sum(len(w.elements) for w in row.windows)
    assert len(lines) == 1 + 3 * len(row.windows) + elements  # a blank line, the header and the names of the columns
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text


def test_a_wide_terminal_cuts_nothing(row):
    wide = as_text(row, 200)
    assert "observation.mission" in wide
    assert "…" not in wide


class Page(HTMLParser):
    """The tags of a page, its pictures, and the files that it needs."""

    def __init__(self):
        super().__init__()
        self.tags, self.pictures, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                kind, _, data = value.partition("base64,")
                (self.pictures if kind == "data:image/png;" else self.links).append(data or value)


def test_the_page_is_self_contained_and_escapes_everything(row):
    text, page = as_html(row), Page()
    page.feed(text)
    assert page.links == []
    assert not {"script", "link", "b", "i"} & set(page.tags)
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "&lt;i&gt;it&lt;/i&gt;" in text
    assert page.tags.count("table") == len(row.windows)
    wanted = [e.picture for w in row.windows for e in w.elements if e.picture is not None]
    assert len(page.pictures) == len(wanted)
    for data, pixels in zip(page.pictures, wanted, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array_equal(np.asarray(picture), pixels)


def test_the_command_line(dataset, row, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "row.html"
    assert main(["tokens", dataset[0], "--step", "3", "--row", "2", "--html", str(page)]) == 0
    assert capsys.readouterr().out == as_text(row, 80) + f"\nwritten: {page}\n"
    assert page.read_text() == as_html(row)
    assert main(["tokens", dataset[0], "--row", "4"]) == 3
    assert "--row 4: a batch of this recipe has rows 0 … 3" in capsys.readouterr().err


def test_a_row_with_a_bad_value_is_shown_as_training_gets_it(tmp_path):
    index = driving.dataset(str(tmp_path / "data"), {"observation": np.nan})
    file = driving.recipe(tmp_path, index.url)
    settings = load_recipe(file, ["data.on_bad_value=quarantine"])
    plan = make_plan(settings, [index], Objectives(settings, [index]))
    planned = plan.windows(0)
    shows = (planned.episode == 3) & (planned.start <= 10) & (planned.start + planned.units > 10)
    row = load_row(str(file), ["data.on_bad_value=quarantine"], 0, int(planned.row[shows][0]))
    assert row.used
    assert not any(w.episode == "e3" and w.start <= 10 < w.start + w.steps for w in row.windows)
