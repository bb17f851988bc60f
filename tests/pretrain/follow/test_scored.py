"""An evaluation that follows a run may be started before the run has published anything."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from tests.pretrain.follow.publishing import policy, publish
from tiphys.pretrain.follow import scored


def test_the_first_step_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "published"
    monkeypatch.setattr(scored, "evaluate", lambda folder, tasks: {"tasks": {}})

    def pause(_: float) -> float:
        publish(policy(tmp_path, 3), str(place))
        return 0.0

    monkeypatch.setattr(scored, "jittered", pause)
    (found,) = islice(scored.scored_steps(str(place), None), 1)
    assert found["step"] == 3
    assert "it has no latest.json" in caplog.text
    assert "it is waited for" in caplog.text
