"""The wire is byte for byte that of the real clients, whose frames stand in data/frames.json; hostile frames are refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.pretrain.serving.serving_fixtures import FRAMES
from tiphys.pretrain.serving import wire

IMAGE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
STATE = np.array([0.5, -1.0, 2.0], np.float32)


def test_a_request_of_openpi() -> None:
    found = wire.decode(FRAMES["openpi request"])
    np.testing.assert_array_equal(found["observation/image"], IMAGE)
    np.testing.assert_array_equal(found["observation/state"], STATE)
    assert (found["prompt"], found["step"], found["count"]) == ("pick it up", 1.5, 7)
    assert wire.encode(found | {"step": np.float64(1.5), "count": np.int32(7)}) == FRAMES["openpi request"]


def test_a_reply_to_openpi() -> None:
    reply = {
        "actions": np.array([[0.25, -0.5]], np.float32),
        "policy_timing": {"infer_ms": 1.5},
        "server_timing": {"infer_ms": 2.0, "prev_total_ms": 2.5},
    }
    assert wire.encode(reply) == FRAMES["openpi reply"]


@pytest.mark.parametrize("name", ["vla-eval observation", "vla-eval raw"])
def test_pictures_of_vla_eval(name: str) -> None:
    found = wire.decode(FRAMES[name])
    assert found["type"] == "observation"
    np.testing.assert_array_equal(found["payload"]["images"]["agentview"], IMAGE)


def test_a_jpeg_of_vla_eval() -> None:
    found = wire.decode(FRAMES["vla-eval jpeg"])["payload"]["images"]["agentview"]
    assert found.shape == (8, 8, 3)
    assert np.abs(found.astype(int) - 128).max() <= 1


def test_replies_to_vla_eval() -> None:
    head: dict[str, Any] = {
        "type": "action",
        "payload": {"actions": STATE[:2] * [0.5, 0.5]},
        "seq": 2,
        "timestamp": 12.5,
    }
    head["payload"]["actions"] = np.array([0.25, -0.5], np.float32)
    assert wire.encode(head, keys=str) == FRAMES["vla-eval action"]
    assert wire.encode(head | {"type": "error", "payload": {"error": "no"}}, keys=str) == FRAMES["vla-eval error"]


def array(dtype: Any = "<f4", shape: Any = (1,), data: Any = b"1234") -> bytes:
    return wire.encode({"a": {"__ndarray__": True, "data": data, "dtype": dtype, "shape": shape}})


def picture(shape: Any, form: str = "png", data: bytes = b"") -> bytes:
    return wire.encode({"a": {"__image__": True, "format": form, "data": data, "shape": shape}})


HOSTILE = {
    "nothing": (b"", "not the MessagePack"),
    "no map": (b"\x90", "a list, not a map"),
    "deep": (b"\x81" * 4000, "not the MessagePack"),
    "nested": (wire.encode({"a": [[[[[[[[[[1]]]]]]]]]]}), "deep"),
    "many elements": (wire.encode({"a": [[0] * 4000] * 20}), "65,536 elements"),
    "many keys": (wire.encode({"a": {str(i): 0 for i in range(300)}}), "not the MessagePack"),
    "a long key": (wire.encode({"k" * 300: 1}), "at most 256"),
    "a number as key": (b"\x81\x01\x01", "a key is a int"),
    "a key twice": (b"\x82\xa1a\x01\xc4\x01a\x02", "twice"),
    "an extension": (b"\x81\xa1a\xd4\x01\x00", "not the MessagePack"),
    "objects": (array("|O8"), "dtype '|O8'"),
    "complex": (array("<c8"), "dtype '<c8'"),
    "records": (array("V4"), "dtype 'V4'"),
    "fields": (array("i4,i4"), "dtype 'i4,i4'"),
    "nothing as text": (array("<U0"), "dtype '<U0'"),
    "no bytes": (array(data="1234"), "must be bytes, not a text"),
    "too few bytes": (array("<f8"), "has 8 bytes, but 4 were sent"),
    "too many bytes": (array("|u1"), "has 1 bytes, but 4 were sent"),
    "a huge shape": (array(shape=(1 << 30, 1 << 30, 1 << 30)), "were sent"),
    "a negative shape": (array(shape=(-1,)), "is not a list"),
    "no text": (array("<U1", data=b"\xff" * 4), "no valid text"),
    "a bomb": (picture((1 << 20, 1 << 20, 3)), "is not taken"),
    "no png": (picture((2, 2, 3), data=b"x"), "cannot be read"),
    "gif": (picture((2, 2, 3), "gif"), "must be png"),
    "bytes": (wire.encode({"a": b"\xff\xfe"}), "UTF-8"),
    "a scalar that does not fit": (
        wire.encode({"a": {"__npgeneric__": True, "data": 300, "dtype": "|u1"}}),
        "does not fit uint8",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused(name: str) -> None:
    frame, said = HOSTILE[name]
    with pytest.raises(wire.Frame) as error:
        wire.decode(frame)
    assert said in str(error.value)


def test_damaged_frames_are_read_or_refused() -> None:
    rng = random.Random(0)
    outcomes = set()
    for number in range(3000):
        frame = bytearray(rng.choice(list(FRAMES.values())))
        for _ in range(rng.choice((1, 2, 8))):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        try:
            found = wire.decode(bytes(frame[: len(frame) - number % 3]))
            assert all(a.dtype.kind in "biufUS" for a in found.values() if isinstance(a, np.ndarray))
            outcomes.add("read")
        except wire.Frame:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
