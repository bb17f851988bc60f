"""The real clients of openpi and vla-eval, and our own, talk to the server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.pretrain.token_fixtures as fixtures
from tests.pretrain.serving.serving_fixtures import ARM, policy, served, serving
from tiphys.dataio.episode import DataError
from tiphys.pretrain.serving.client import RemotePolicy, ServerRefused
from tiphys.pretrain.serving.observed import Names
from tiphys.pretrain.serving.server import Door


@pytest.fixture(scope="module")
def server() -> Any:
    with serving(served(), names=Names.from_words(["states=observation"])) as found:
        yield found


def test_the_client_of_openpi(server: Any) -> None:
    module = pytest.importorskip("openpi_client.websocket_client_policy", reason="needs openpi-client (--no-deps)")
    client = module.WebsocketClientPolicy("127.0.0.1", server.port)
    assert client.get_server_metadata()["execute"] == 1
    own = policy()
    own.reset("arm")
    for k in range(3):
        found = client.infer({"observation": ARM * k, "prompt": "reach"})
        np.testing.assert_allclose(found["actions"][0], own.act(ARM * k), atol=1e-5)
    client.reset()
    with pytest.raises(RuntimeError, match=r"(?s)Error in inference server.*needs observation \[5\]"):
        client.infer({"x": ARM})
    client._ws.close()


def test_the_client_of_vla_eval(server: Any) -> None:
    connection = pytest.importorskip("vla_eval.connection", reason="needs vla-eval 0.8").Connection

    async def episode() -> list[np.ndarray]:
        async with connection(f"ws://127.0.0.1:{server.port}/vla-eval") as found:
            assert found.server_info["model_server"] == "tiphys"
            await found.start_episode({"task": {"name": "reach"}})
            image = np.zeros((8, 8, 3), np.uint8)  # it is sent as PNG, and the policy does not need it
            seen = [{"states": ARM * k, "images": {"agentview": image}, "task_description": "reach"} for k in range(3)]
            actions = [(await found.act(one))["actions"] for one in seen]
            with pytest.raises(RuntimeError, match=r"needs observation \[5\]"):
                await found.act({"images": {"agentview": image}})
            await found.end_episode({"metrics": {}})
            return actions

    own = policy()
    own.reset("arm")
    np.testing.assert_allclose(asyncio.run(episode()), [own.act(ARM * k) for k in range(3)], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sample": True}])
def test_our_client_acts_as_the_policy(options: dict[str, Any]) -> None:
    own = policy(fixtures.GRID, fixtures.CAMERA, paradigm="dt", **options)
    with serving(served(fixtures.GRID, fixtures.CAMERA, paradigm="dt")) as server:
        away = RemotePolicy(f"ws://127.0.0.1:{server.port}", own.processor, digest="digest", **options)
        for task in (fixtures.GRID, fixtures.CAMERA):
            rng = np.random.default_rng(0)
            for one in (own, away):
                one.reset(task.name, 2, target_return=1.0)
                one.limit(task.fields)
                for i in range(2):
                    one.restart(i, stream=i + 5)
            for active in ([0, 1], [1], [0, 1]):
                seen = [{f.name: fixtures.values(f, 1, rng)[0] for f in task.with_role("observation")} for _ in active]
                seen = [one | {f.name: "go" for f in task.with_role("text")} for one in seen]
                rewards = rng.normal(size=len(active)).tolist()
                found, expected = away.act(seen, rewards, active), own.act(seen, rewards, active)
                for a, b in zip(found, expected, strict=True):
                    assert type(a) is type(b)
                    assert (a.keys() == b.keys()) if isinstance(b, dict) else True
                    np.testing.assert_allclose(flat(a), flat(b), atol=1e-5)
        away.close()


def test_our_client_executes_the_chunk_of_a_longer_horizon() -> None:
    options: dict[str, Any] = {"horizon": 5, "chunk": 2, "head": "l1"}
    own = policy(**options)
    with serving(served(**options)) as server:
        away = RemotePolicy(f"ws://127.0.0.1:{server.port}", own.processor)
        for one in (own, away):
            one.reset("arm")
            one.restart(0)
        for k in range(5):
            found, expected = away.act([ARM * k], [0.0], [0]), own.act([ARM * k], [0.0], [0])
            np.testing.assert_allclose(flat(found[0]), flat(expected[0]), atol=1e-5)
        away.close()


def flat(action: Any) -> np.ndarray:
    parts = action.values() if isinstance(action, dict) else [action]
    return np.concatenate([np.ravel(part) for part in parts])


def test_our_client_says_what_is_wrong(tmp_path: Path) -> None:
    own = policy()
    (tmp_path / "processor.json").write_text(json.dumps(own.processor.to_dict()))
    with serving(served(), Door(port=0, api_key="k")) as server:
        url = f"ws://127.0.0.1:{server.port}"
        with pytest.raises(ServerRefused, match="status 401: this server needs its key"):
            RemotePolicy.of(tmp_path, url).reset("arm")
        with pytest.raises(ServerRefused, match="holds another policy"):
            RemotePolicy.of(tmp_path, url, api_key="k", digest="other").reset("arm")
        away = RemotePolicy.of(tmp_path, url, api_key="k", digest="digest")
        assert away.sessions() == 8
        with pytest.raises(DataError, match="takes no demonstration, goal, query or future"):
            away.reset("arm", goal={})
        away.reset("arm", objective="other")
        away.restart(0)
        with pytest.raises(ServerRefused, match="not trained with an objective 'other'"):
            away.act([ARM], [0.0], [0])
        away.close()
    with pytest.raises(ServerRefused, match="no server can be reached"):
        RemotePolicy.of(tmp_path, url).reset("arm")
