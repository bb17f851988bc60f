"""The report is one page that needs no other file and shows what the files of the run say."""

import json
import shutil
from html.parser import HTMLParser

import pytest

from tiphys.launch.report import svg, write_comparison, write_report
from tiphys.launch.report.files import RunFiles
from tiphys.launch.report.verdict import breakdown, verdict

TASK = {
    "episodes": 4,
    "mean_return": 12.5,
    "success_rate": 0.75,
    "random": 0.1,
    "expert": 1.0,
    "expert_normalized": 0.72,
    "expert_normalized_interval": [0.2, 0.9],
    "pictures": [{"seed": 1, "file": "a.png"}],
}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]


@pytest.fixture
def run(tmp_path):
    lines = [
        {
            "step": step,
            "loss": 3.0 / step,
            "auxiliary": 0.01,
            "gradient_norm": 1.0,
            "learning_rate": 1e-3,
            "rows": 8,
            "tokens": 100,
            "tokens_per_second": 1000.0,
            "mfu": 0.1,
            "seconds": 0.1,
            "data_wait": 0.001,
            "loss_by_task": {"<b>task</b>": 1.0 / step},
            "loader": {"cache_hit_rate": 0.5, "cache_hit_bound": 0.6},
        }
        for step in range(1, 8)
    ]
    lines.append({"kind": "validation", "step": 7, "loss": 0.6})
    lines.append({"kind": "experts", "step": 7, "tokens_by_task": {"<b>task</b>": [[3, 1], [2, 2]]}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "evaluation.json").write_text(json.dumps({"tasks": {"<b>task</b>": TASK}}))
    (tmp_path / "recipe.yaml").write_text("name: a run\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_the_page_is_complete_and_needs_no_network(run):
    page = write_report(run).read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "script" not in links.tags
    assert links.tags.count("svg") == 9 + 2  # charts that have values, and one heat map per layer
    assert "data:image/png;base64," in page


def test_it_shows_what_the_files_say_and_escapes_names(run):
    page = write_report(run).read_text()
    assert "<h1>a run</h1>" in page
    assert "&lt;b&gt;task&lt;/b&gt;" in page
    assert "<b>task</b>" not in page
    assert "0.72" in page
    assert "0.20 … 0.90" in page
    assert "0.429" in page  # loss of the last step


def test_it_shows_results_by_objective_and_achieved_over_asked_returns(run):
    point = {**TASK, "mean_return_interval": [10.0, 15.0]}
    curve = [{**point, "asked": f"q{a}", "target_return": float(a), "mean_return": 2.0 * a} for a in (1, 3)]
    dt = {**point, "objective": "dt", "target_return": 5.0, "curve": curve, "objectives": {"<i>bc</i>": TASK}}
    (run / "evaluation.json").write_text(json.dumps({"tasks": {"reach": dt}}))
    page = write_report(run).read_text()
    assert page.count("<td>reach</td>") == 2
    assert "<th>asked return</th>" in page
    assert "&lt;i&gt;bc&lt;/i&gt;" in page
    assert "reach, dt: achieved return over asked return" in page
    links = Links()
    links.feed(page)
    assert links.tags.count("svg") == 9 + 2 + 1


def test_it_shows_action_errors_by_task_and_field(run):
    with open(run / "metrics.jsonl", "a") as file:
        for step in (8, 9):
            errors = {"<b>task</b>": {"action.arm": 0.1, "action.hand": 0.5}}
            file.write(json.dumps({"kind": "validation", "step": step, "loss": 0.5, "action_error": errors}) + "\n")
    page = write_report(run).read_text()
    assert "Open-loop action error of &lt;b&gt;task&lt;/b&gt;, held out" in page
    assert "action.hand" in page


def test_a_run_without_evaluation_or_steps_still_has_a_page(run):
    (run / "evaluation.json").unlink()
    (run / "metrics.jsonl").write_text("")
    assert "no training step yet" in write_report(run).read_text()


def test_it_lists_changes_of_the_mixture_and_leaves_out_a_cut_off_line(run):
    event = {"kind": "weights", "step": 7, "weights": {"0:<a>": 0.5}}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "change", "step": 6, "event": event}) + '\n{"step": 8, "lo')
    assert "From step 7 on: mixture weights 0:&lt;a&gt; = 0.5" in write_report(run).read_text()
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line \d+: not JSON"):
        write_report(run)


def launch(step, **more):
    return {"kind": "launch", "step": step, "time": "2026-11-30T01:00:00+00:00", "host": "node-1", "device": "cpu"} | {
        "ranks": 2,
        "layout": "1 pipeline × 2 data",
        "precision": "fp32",
        **more,
    }


def plan(step, first, windows, epoch):
    entries = {"0:<a>": {"windows": windows, "episodes": 9, "steps_per_epoch": epoch}}
    return {"kind": "plan", "step": step, "first": first, "entries": entries}


def add(run, *lines):
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_it_says_when_and_where_the_run_trained_and_how_often_it_saw_its_data(run):
    add(run, launch(0), launch(4, host="node-2"), plan(0, 0, 1.0, 2.0), plan(4, 5, 0.5, 4.0))
    page = write_report(run).read_text()
    assert "2026-11-30 01:00 UTC, after step 4" in page
    assert "node-1, node-2" in page
    assert "Resumed after step 4" in page
    assert "<td>0:&lt;a&gt;</td><td>50.0%</td><td>9</td><td>3.00</td>" in page  # 5 / 2 + 2 / 4


def test_the_verdict_names_what_needs_a_look_and_the_bottleneck(run):
    (run / "recipe.yaml").write_text("name: a run\ndata: {validation: 0.1}\n")
    found = verdict(RunFiles.read(run))
    assert found.line == "healthy. Bottleneck: compute; data wait 1.0%"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slow = [line | {"data_wait": 0.09} if "kind" not in line else line for line in lines]
    rising = [{"kind": "validation", "step": step, "loss": loss} for step, loss in ((1, 1.0), (2, 0.5), (8, 0.9))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*slow, *rising]))
    (run / "rollbacks.jsonl").write_text('{"first": 3, "last": 3, "to": 2, "log": [], "episodes": []}\n')
    found = verdict(RunFiles.read(run))
    assert not found.healthy
    assert "held-out loss rises since step 2" in found.line
    assert "1 rollbacks" in found.line
    assert found.bottleneck == "waiting for data; data wait 90.0%"
    page = write_report(run).read_text()
    assert "Needs a look" in page
    assert "went back from step 3 to 2" in page.lower()


def test_a_step_is_broken_down(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["phases"] = {"rows": 0.001, "forward": 0.03, "backward": 0.05, "step": 0.009, "save": 0.01}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = dict(breakdown(RunFiles.read(run).train))
    assert parts["backward"] == pytest.approx(0.5)
    assert sum(parts.values()) == pytest.approx(1.0)
    assert "saving checkpoints 10.0%" in write_report(run).read_text()


def test_it_shows_perplexities_of_texts(run):
    with open(run / "metrics.jsonl", "a") as file:
        for step in (1, 2):
            known = {"book": {"token": 9.0 / step, "byte": 2.0}}
            file.write(json.dumps({"kind": "validation", "step": step, "loss": 0.5, "perplexity": known}) + "\n")
    page = write_report(run).read_text()
    assert "Perplexity of texts by token, held out" in page
    assert page.index("Perplexity of texts by token") < page.index("Perplexity of texts by byte")


def test_it_shows_the_gradient_of_each_line_and_chosen_weights(run):
    with open(run / "metrics.jsonl") as file:
        line = json.loads(file.readline())
    known = {"gradient_by_line": {"0:a": 0.7, "1:b": 0.3}, "loss_weights": {"1:b": 0.01}}
    with open(run / "metrics.jsonl", "a") as file:
        for step in (8, 9):
            file.write(json.dumps({**line, "step": step, **known}) + "\n")
    page = write_report(run).read_text()
    assert "Share of the gradient (Σ weight · loss) by mixture line" in page
    assert "Loss weights that are chosen" in page


def test_charts_start_at_step_0_say_how_they_smooth_and_keep_spikes():
    points = [(step, 1.0) for step in range(1000, 5000)]
    points[1234] = (points[1234][0], 99.0)
    chart = svg.lines({"loss": points}, log=True, smoothed=25)
    assert ">0</text>" in chart
    assert "mean of 25 points, logarithmic axis" in chart
    assert (points[1234][0], 99.0) in svg._thinned(points)
    assert svg.smooth([(0, 1.0)] * 49) == [(0, 1.0)] * 49
    assert [y for _, y in svg.smooth([(i, float(i >= 25)) for i in range(50)])][-1] == 1.0


def test_several_runs_are_compared_on_one_page(run, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(run, other)
    (other / "recipe.yaml").write_text("name: a run\nmodel: {layers: <b>}\n")
    page = write_comparison([run, other], other / "page.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "<td>model.layers</td><td>–</td><td>&lt;b&gt;</td>" in page
    assert page.count("<polyline") >= 2 * 4
    assert page.count("<td>&lt;b&gt;task&lt;/b&gt;</td>") == 1  # one line for the task, with the score of each run
    with pytest.raises(ValueError, match="given twice"):
        write_comparison([run, run], other / "page.html")


def test_runs_without_known_scores_are_compared_by_their_returns(run, tmp_path_factory):
    unknown = TASK | {"expert_normalized": None, "success_rate": None}
    other = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(run, other)
    for folder, returned in ((run, 12.5), (other, 25.0)):
        tasks = {"tasks": {"cart": unknown | {"mean_return": returned}}}
        (folder / "evaluation.json").write_text(json.dumps(tasks))
    page = write_comparison([run, other], other / "page.html").read_text()
    assert "<td>cart</td><td>–</td><td>return</td><td>12.5</td><td>25</td>" in page


@pytest.mark.parametrize(("steps", "said"), [(7, True), (8, False)])
def test_a_finished_run_without_held_out_episodes_needs_a_look(run, steps, said):
    (run / "recipe.yaml").write_text(f"name: a run\ndata: {{validation: 0.01}}\ntrain: {{steps: {steps}}}\n")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if "kind" not in line))
    message = "no episodes are held out (data.validation of 0.01 is less than one episode)"
    assert (message in verdict(RunFiles.read(run)).line) is said


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        write_report(tmp_path)


def test_numbers_of_another_type_cannot_become_markup(run):
    (run / "evaluation.json").write_text(
        (run / "evaluation.json").read_text().replace('"episodes": ', '"episodes": "<script>", "n": ')
    )
    text = write_report(run).read_text()
    assert "<script>" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text


def test_only_a_mixture_of_experts_has_a_chart_of_its_balance(run):
    assert "Balance and z-loss" in write_report(run).read_text()
    (run / "metrics.jsonl").write_text(
        (run / "metrics.jsonl").read_text().replace('"auxiliary": 0.01', '"auxiliary": 0.0')
    )
    assert "Balance and z-loss" not in write_report(run).read_text()
