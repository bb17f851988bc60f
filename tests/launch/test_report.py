"""The report is one page that needs no other file and shows what the files of the run say."""

import json
from html.parser import HTMLParser

import pytest

from tiphys.launch.report import write_report

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
    assert links.tags.count("svg") == 8 + 2  # curves, and one heat map per layer
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
    assert links.tags.count("svg") == 8 + 2 + 1


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
