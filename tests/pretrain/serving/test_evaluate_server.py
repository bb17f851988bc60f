"""An evaluation whose actions a server chooses has the scores of one without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gymnasium", reason="needs the envs extra")

import tests.pretrain.acting.acting_fixtures as acting
from tests.pretrain.serving.serving_fixtures import serving
from tiphys.dataio.episode import DataError
from tiphys.pretrain.evaluate import evaluate
from tiphys.pretrain.serving.client import ServerRefused
from tiphys.pretrain.serving.served import Served, Settings
from tiphys.pretrain.serving.server import Door

pytestmark = pytest.mark.envs


@pytest.mark.parametrize("sample", [False, True])
def test_the_scores_are_those_without_a_server(tmp_path: Path, sample: bool) -> None:
    folder = acting.folder(tmp_path / "policy", acting.objectives((acting.CART, acting.GRID)))
    (tmp_path / "key").write_text("k")
    options: dict[str, Any] = {"episodes": 3, "processes": 1, "sample": sample}
    expected = evaluate(folder, **options)
    with serving(Served.load(folder, Settings(sessions=10)), Door(port=0, api_key="k")) as server:
        url = f"ws://127.0.0.1:{server.port}"
        assert evaluate(folder, **options, server=url, api_key_file=tmp_path / "key") == expected


def test_another_policy_is_refused_before_anything_is_played(tmp_path: Path) -> None:
    folder = acting.folder(tmp_path / "policy", acting.objectives((acting.CART,)))
    other = acting.folder(tmp_path / "other", acting.objectives((acting.CART,)), seed=1)
    with serving(Served.load(folder, Settings(sessions=2)), Door(port=0)) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with pytest.raises(ServerRefused, match="another policy"):
            evaluate(other, server=url)
        with pytest.raises(DataError, match="--sessions 10 or more"):
            evaluate(folder, server=url)
