"""The server over real sockets: both wires, who may come in, and what a client is told if it is refused."""

from __future__ import annotations

import logging
import threading
import time
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.pretrain.serving.serving_fixtures import ARM, FRAMES, asked, client, served, serving
from tiphys.dataio.episode import DataError
from tiphys.pretrain.serving import wire
from tiphys.pretrain.serving.observed import Names
from tiphys.pretrain.serving.served import Served, Settings
from tiphys.pretrain.serving.server import Door, Server, read_key

from websockets.exceptions import ConnectionClosed, InvalidStatus  # isort: skip


@pytest.fixture(scope="module")
def server() -> Any:
    with serving(served(), names=Names.from_words(["states=observation"])) as found:
        yield found


def status(server: Server, headers: dict[str, str]) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as error, client(server, additional_headers=headers):
        pass
    return error.value.response.status_code, error.value.response.body.decode()


def test_openpi_is_answered(server: Server) -> None:
    with client(server, "/any/path") as connection:
        metadata = wire.decode(connection.recv(30))
        assert (metadata["server"], metadata["digest"], metadata["execute"]) == ("tiphys", "digest", 1)
        assert metadata["tasks"]["arm"]["observations"]["observation"]["shape"] == [5]
        first, second = (asked(connection, observation=ARM) for _ in range(2))
        assert (first["actions"].dtype, first["actions"].shape) == (np.float32, (1, 2))
        assert first["server_timing"].keys() == {"infer_ms"}
        assert second["server_timing"].keys() == {"infer_ms", "prev_total_ms"}
        assert first["policy_timing"]["infer_ms"] > 0
        assert connection.subprotocol is None
        assert not connection.protocol.extensions


def test_sessions_of_a_connection_are_apart(server: Server) -> None:
    with client(server) as connection, client(server) as other:
        connection.recv(30), other.recv(30)
        one = [asked(connection, observation=ARM * k, session_id="a")["actions"] for k in range(3)]
        asked(connection, observation=ARM * 9, session_id="b")
        two = [asked(other, observation=ARM * k)["actions"] for k in range(3)]
        np.testing.assert_allclose(one, two, atol=1e-5)
        assert asked(connection, endpoint="reset", session_id="a") == {"reset": True, "session_id": "a"}
        reply = asked(connection, endpoint="infer", observation=ARM * 0, session_id="a", native=True)
        np.testing.assert_allclose(reply["actions"]["action"], one[0], atol=1e-5)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        ("text", "a text frame was sent"),
        (b"\xc1", "not the MessagePack"),
        (wire.encode({"x": ARM}), "task 'arm' needs observation"),
        (wire.encode({"observation": ARM, "endpoint": "stop"}), "neither 'infer' nor 'reset'"),
        (wire.encode({"endpoint": "reset", "stream": -1}), "`stream` is -1"),
        (wire.encode({"endpoint": "reset", "limits": [{"name": "action", "low": "x"}]}), "must be a list of numbers"),
        (wire.encode({"observation": ARM, "reward": float("nan")}), "`reward` must be a finite number"),
    ],
)
def test_a_refusal_is_a_text_and_ends_the_connection(server: Server, frame: Any, said: str) -> None:
    with client(server) as connection:
        connection.recv(30)
        connection.send(frame)
        reply = connection.recv(30)
        assert isinstance(reply, str)
        assert said in reply
        assert "Traceback" not in reply
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(30)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011


def test_a_frame_that_is_too_large_is_refused(server: Server) -> None:
    with client(server) as connection:
        connection.recv(30)
        with suppress(ConnectionClosed):  # the server may close it before all bytes are sent
            connection.send(bytes(wire.MOST_BYTES + 1))
        with pytest.raises(ConnectionClosed):
            connection.recv(30)
        assert connection.protocol.close_rcvd is not None
        assert connection.protocol.close_rcvd.code == 1009


def told(connection: Any, kind: str, number: int, **payload: Any) -> None:
    connection.send(wire.encode({"type": kind, "payload": payload, "seq": number, "timestamp": 0.0}, keys=str))


def test_vla_eval_is_answered_and_stays_connected_after_an_error(server: Server) -> None:
    with client(server, "/vla-eval") as connection:
        connection.send(FRAMES["vla-eval hello"])  # the client speaks first
        hello = wire.decode(connection.recv(30))
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 0, 1)
        told(connection, "episode_start", 1, task={"name": "reach"})
        told(connection, "observation", 2, states=ARM, task_description="reach")
        first = wire.decode(connection.recv(30))
        assert (first["type"], first["seq"], first["payload"]["actions"].shape) == ("action", 2, (2,))
        told(connection, "observation", 3, states=ARM[:3], task_description="reach")
        error = wire.decode(connection.recv(30))
        assert (error["type"], error["seq"]) == ("error", 3)
        assert "has shape [3]" in error["payload"]["error"]
        connection.send(b"\xc1")
        assert wire.decode(connection.recv(30))["type"] == "error"
        told(connection, "episode_end", 4, metrics={})
        told(connection, "episode_start", 5, task={})
        told(connection, "observation", 6, states=ARM, task_description="reach")
        again = wire.decode(connection.recv(30))["payload"]["actions"]
        np.testing.assert_allclose(again, first["payload"]["actions"], atol=1e-5)


def test_healthz_answers_without_a_key(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz") as reply:
        assert (reply.status, reply.read()) == (200, b"OK\n")


def test_the_key_is_asked_for_and_stands_in_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "key").write_text("right-key\n")
    door = Door(port=0, api_key=read_key(tmp_path / "key"))
    with serving(served(), door) as server:
        for headers in ({}, {"Authorization": "Api-Key wrong-key"}, {"Authorization": "Bearer right-key"}):
            code, said = status(server, headers)
            assert code == 401
            assert "Authorization: Api-Key KEY" in said
        with client(server, additional_headers={"Authorization": "Api-Key right-key"}) as connection:
            assert wire.decode(connection.recv(30))["server"] == "tiphys"
        assert urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz").status == 200
    output = "".join(capsys.readouterr()) + "".join(r.getMessage() for r in caplog.records if "client" not in r.name)
    assert "wrong-key" not in output
    assert "right-key" not in output + repr(door)
    (tmp_path / "key").write_text("two words")
    with pytest.raises(DataError, match="an API key is one line"):
        read_key(tmp_path / "key")


def test_web_pages_are_refused(server: Server) -> None:
    assert status(server, {"Origin": "http://127.0.0.1"})[0] == 403


def test_other_machines_need_a_key_or_open() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "robot.local"):
        with pytest.raises(DataError, match="give an --api-key-file, or --open"):
            Door(host)
        assert Door(host, open=True).host == host
        assert Door(host, api_key="k").host == host
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        assert Door(host).host == host


def test_a_full_server_says_so_and_a_place_is_free_again() -> None:
    with serving(served(settings=Settings(sessions=2))) as server:
        with client(server) as one, client(server) as two:
            for connection in (one, two):
                connection.recv(30)
                asked(connection, observation=ARM)
            code, said = status(server, {})
            assert code == 503
            assert "all 2 sessions" in said
            one.send(wire.encode({"observation": ARM, "session_id": "another"}))
            assert "--sessions" in str(one.recv(30))
        for _ in range(200):  # the server learns a little later that they left
            if not server.full:
                break
            time.sleep(0.05)
        with client(server) as connection:
            connection.recv(30)
            asked(connection, observation=ARM)


class Slow(Served):
    """A policy whose forward passes end when they are let."""

    def histories(self, *arguments: Any) -> Any:
        found = super().histories(*arguments)
        act, self.sizes = found.act, getattr(self, "sizes", [])

        def slow(rows: Any, *rest: Any) -> Any:
            self.sizes.append(len(rows))
            assert self.go.wait(30)
            return act(rows, *rest)

        found.act = slow  # type: ignore[method-assign]
        return found


def slow() -> Slow:
    of = served()
    found = Slow.__new__(Slow)
    found.__dict__.update(of.__dict__)
    found.go = threading.Event()  # type: ignore[attr-defined]
    return found


def test_a_forward_pass_delays_no_ping_and_no_handshake() -> None:
    of = slow()
    with serving(of) as server, client(server) as one:
        one.recv(30)
        one.send(wire.encode({"observation": ARM}))
        with client(server) as two:
            assert wire.decode(two.recv(30))["server"] == "tiphys"
            assert one.ping().wait(30)
        of.go.set()  # type: ignore[attr-defined]
        assert isinstance(one.recv(30), bytes)


def test_clients_that_ask_at_the_same_time_share_a_forward_pass() -> None:
    of = slow()
    of.go.set()  # type: ignore[attr-defined]
    with serving(of, wait=0.5, batch=4) as server, ExitStack() as stack:
        clients = [stack.enter_context(client(server)) for _ in range(4)]
        for connection in clients:
            connection.recv(30)
        for _ in range(4):
            for connection in clients:
                connection.send(wire.encode({"observation": ARM}))
            for connection in clients:
                assert isinstance(connection.recv(30), bytes)
    assert 4 in of.sizes


def test_a_client_that_leaves_during_a_forward_pass_harms_nobody() -> None:
    of = slow()
    with serving(of) as server, client(server) as other:
        other.recv(30)
        with client(server) as gone:
            gone.recv(30)
            gone.send(wire.encode({"observation": ARM}))
        of.go.set()  # type: ignore[attr-defined]
        asked(other, observation=ARM)


def test_a_defect_is_not_told_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    of = served()
    monkeypatch.setattr(of, "choose", lambda *_: 1 / 0)
    with serving(of) as server, client(server) as connection:
        connection.recv(30)
        connection.send(wire.encode({"observation": ARM}))
        assert connection.recv(30) == "an error inside the server (ZeroDivisionError); its output says more"
