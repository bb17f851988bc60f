"""A reader process that crashes, hangs, needs too much memory or sends invalid bytes causes a DataError.

Episodes after a crash are still read.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.dtypes import StringDType

from tiphys.dataio.convert import wire
from tiphys.dataio.convert.converter import BadEpisode, Item
from tiphys.dataio.convert.process import Reader
from tiphys.dataio.convert.source import SourceUnavailable
from tiphys.dataio.episode import DataError, Episode

READERS = """
    import os, time
    import numpy as np
    from tiphys.dataio.convert.converter import Converter, Piece
    from tiphys.dataio.convert.source import SourceUnavailable
    from tiphys.dataio.episode import DataError, Episode

    class FaultyConverter(Converter):
        name = "faulty"
        options_known = frozenset({"how", "at"})
        @classmethod
        def recognise(cls, source):
            return 1.0
        def pieces(self):
            return [Piece("0")]
        def episodes(self, piece, start=0):
            for number in range(start, 5):
                if number in self.options["at"]:
                    getattr(self, self.options["how"])()
                yield Episode(f"e{number}", "t", {"action": np.full((3, 2), number, np.float32)}, 3)
        def crash(self):
            import ctypes
            ctypes.string_at(0)
        def leave(self):
            os._exit(7)
        def hang(self):
            time.sleep(1000)
        def eat(self):
            self.kept = np.ones(1 << 30)
        def chatter(self):
            print("noise on stdout")
        def bug(self):
            raise KeyError("feature")
        def store(self):
            raise SourceUnavailable("bucket: 503")
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "faulty.py").write_text(textwrap.dedent(READERS))
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(how: str, at: list[int], **options: Any) -> list[Item]:
        with Reader(str(tmp_path), "faulty:FaultyConverter", {"how": how, "at": at}, **options) as reader:
            (piece,) = reader.plan().pieces if how == "chatter" else (_piece(),)
            return list(reader.episodes(piece))

    return make


def _piece() -> Any:
    from tiphys.dataio.convert.converter import Piece

    return Piece("0")


def ids(items: list[Item]) -> list[str]:
    return [i.id if isinstance(i, Episode) else "bad" for i in items]


def test_a_crash_makes_one_bad_episode(faulty: Any) -> None:
    items = faulty("crash", [1, 3])
    assert ids(items) == ["e0", "bad", "e2", "bad", "e4"]
    assert isinstance(items[1], BadEpisode)
    assert "killed by SIGSEGV" in items[1].reason


def test_three_crashes_in_a_row_raise_an_error(faulty: Any) -> None:
    with pytest.raises(DataError, match=r"ended with status 7.*three times in a row"):
        faulty("leave", [1, 2, 3])


def test_a_hanging_reader_is_stopped(faulty: Any) -> None:
    items = faulty("hang", [4], timeout=6.0)
    assert ids(items) == ["e0", "e1", "e2", "e3", "bad"]
    assert "no answer for 6 s" in items[4].reason


def test_memory_is_limited(faulty: Any) -> None:
    with pytest.raises(DataError, match="needs more than the 1,024 MiB"):
        faulty("eat", [2], memory=1 << 30)


def test_output_on_stdout_does_not_disturb(faulty: Any) -> None:
    assert ids(faulty("chatter", [0, 1])) == ["e0", "e1", "e2", "e3", "e4"]


def test_a_bug_is_reported_with_its_place(faulty: Any) -> None:
    with pytest.raises(DataError, match=r"KeyError: 'feature' \(at faulty\.py:\d+\)"):
        faulty("bug", [2])


def test_a_failing_store_does_not_make_a_bad_episode(faulty: Any) -> None:
    with pytest.raises(SourceUnavailable, match="503"):
        faulty("store", [2])


def test_no_child_process_is_left(faulty: Any) -> None:
    before = _children()
    faulty("crash", [2])
    assert _children() == before


def _children() -> set[str]:
    task = Path(f"/proc/{os.getpid()}/task")
    return {c for t in task.iterdir() for c in (t / "children").read_text().split()}


def _reading(parts: list[bytes | memoryview]) -> Any:
    data, at = b"".join(bytes(p) for p in parts), 0

    def read_into(view: memoryview) -> None:
        nonlocal at
        if at + len(view) > len(data):
            raise DataError("ended")
        view[:] = data[at : at + len(view)]
        at += len(view)

    return read_into


def test_sending_an_episode_keeps_everything() -> None:
    fields = {
        "b": np.array([True, False]),
        "f": np.arange(6, dtype=">f8").reshape(2, 3)[:, ::-1],
        "empty": np.zeros((2, 0), np.int16),
        "words": np.array(["", "ü\n"], dtype=StringDType()),
        "scalar": np.float32(0.5),
        "one": "text",
    }
    episode = Episode("i", "t", fields, 2, success=False, agent="a", info={"n": np.float32(0.5), "l": np.arange(2)})
    back = wire.load(_reading(wire.dump(episode)), "x")
    assert (back.id, back.task, back.steps, back.success, back.agent) == ("i", "t", 2, False, "a")
    assert back.info == {"n": 0.5, "l": [0, 1]}
    assert list(back.fields) == list(fields)
    for key, value in fields.items():
        assert np.asarray(back.fields[key]).tolist() == np.asarray(value).tolist()
        assert np.shape(back.fields[key]) == np.shape(value)


def test_damaged_bytes_on_the_wire_raise_only_data_errors() -> None:
    good = b"".join(bytes(p) for p in wire.dump(Episode("i", "t", {"a": np.zeros((2, 3))}, 2)))
    random_numbers = np.random.default_rng(0)
    for _ in range(500):
        data = bytearray(good)
        for _ in range(random_numbers.integers(1, 4)):
            data[random_numbers.integers(len(data))] = random_numbers.integers(256)
        with contextlib.suppress(DataError):
            wire.load(_reading([bytes(data[: random_numbers.integers(1, len(data) + 1)])]), "x")
    with pytest.raises(DataError, match="dtype object"):
        wire.dump(Episode("i", "t", {"a": np.array([{}, []], object)}, 2))
