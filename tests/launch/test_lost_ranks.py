"""If one rank fails, the other one says why and ends with the status that the failed rank meant."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.processes import Ranks
from tiphys.launch.launches import Launch, RankReport
from tiphys.launch.run import lost
from tiphys.launch.statuses import Status
from tiphys.pretrain.parallel import PeerLost, lost_peer

HERE = Path(__file__).parent
RECIPE = f"""
name: lost
data: {{mixture: [{{dataset: {HERE.parent / "golden" / "data" / "cart"}, objective: bc}}], validation: 0}}
objectives: {{bc: {{context: 32, window: 4}}}}
model: {{layers: 2, hidden: 16, heads: 2, text_vocabulary: 300, moe: {{experts: 2}}}}
deepspeed:
  train_batch_size: 8
  zero_optimization: {{stage: 2}}
  optimizer: {{type: AdamW, params: {{lr: 1e-2}}}}
train: {{steps: 1000}}
"""


@pytest.mark.parametrize(
    "how, zero, statuses, said",
    [
        ("killed", 2, [Status.GAVE_UP, -signal.SIGKILL], "It left no report"),
        ("refused", 2, [Status.REFUSED] * 2, "Rank 1 reported after step 2: DataError: episode 7 is damaged"),
        pytest.param("killed", 3, [Status.GAVE_UP, -signal.SIGKILL], "It left no report", marks=pytest.mark.long),
        pytest.param(
            *("crashed", 2, [Status.CRASHED] * 2, "Rank 1 reported after step 2: AttributeError: no such thing"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_rank_says_why_another_one_is_gone(
    how: str, zero: int, statuses: list[int], said: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    Launch.new(tmp_path / "run").write(RankReport(0, 9, "of an earlier launch", Status.CRASHED))
    script = HERE / "failing_rank.py"
    overrides = [f"run.dir={tmp_path / 'run'}", f"deepspeed.zero_optimization.stage={zero}"]
    ranks = Ranks(script, [how, tmp_path / "recipe.yaml", *overrides], 2)
    try:
        assert [p.wait(400) for p in ranks.processes] == statuses, ranks.text()
    finally:
        ranks.kill()
    text = ranks.text()
    assert "another process of this run is gone or cannot be reached" in text
    assert said in text
    assert "of an earlier launch" not in text
    assert ("Traceback" in text) == (how == "crashed")
    reports = Launch(tmp_path / "run", 2).reports()
    assert [(r.rank, r.step, r.status, r.lost) for r in reports] == [
        (0, 2, statuses[0], True),
        *([] if how == "killed" else [(1, 2, statuses[1], False)]),
    ]
    assert not (tmp_path / "run" / "lease.json").exists()


def test_reports_are_read_as_written_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    reports = [RankReport(0, 5, "DataError: x", Status.REFUSED), RankReport(12, 6, "gone", Status.GAVE_UP, True, "b")]
    launch = Launch.new(tmp_path)
    for report in reports:
        launch.write(report)
    (launch.folder / "rank-00003.json").write_text('{"rank": 3')
    assert launch.reports() == reports
    assert json.loads((tmp_path / "launches" / "0001" / "rank-00012.json").read_text())["status"] == 75
    assert Launch.new(tmp_path).number == 2
    assert Launch.new(tmp_path).reports() == []


def test_an_error_is_a_lost_peer_by_where_it_was_raised_and_not_by_its_words() -> None:
    def caught(call: object) -> BaseException:
        try:
            call()  # type: ignore[operator]
        except BaseException as error:
            return error
        raise AssertionError

    def time_out() -> None:
        raise RuntimeError("Timed out: Connection closed by peer")

    assert lost_peer(PeerLost("x"))
    assert lost_peer(torch.distributed.DistBackendError("x"))
    assert not lost_peer(caught(time_out))
    assert not lost_peer(caught(lambda: torch.ones(2) @ torch.ones(3)))


def test_the_message_says_how_to_go_on() -> None:
    error = PeerLost("first line\n[pair.cc:553] Connection closed by peer [10.0.0.2]:29500\nlast line")
    alone = lost(error, 12, 0, [])
    assert "(Connection closed by peer [10.0.0.2]:29500)" in alone
    assert alone.endswith("The same command resumes from the beginning: no checkpoint has been written yet")
    told = lost(error, 12, 8, [RankReport(3, 11, "DataError: bad shard", Status.REFUSED)])
    assert told.endswith(
        "Rank 3 reported after step 11: DataError: bad shard. Once that is fixed, the same command resumes from step 8"
    )
