"""`tiphys index` and `tiphys convert` find the same pictures and captions in tars that Tiphys did not write."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import index_foreign, read_episode
from tiphys.dataio.episode import DataError
from tiphys.dataio.format.captions import clean_text, decode_text
from tiphys.dataio.index import EpisodeIndex


def picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]], mode: Any = "w", encoding: str = "utf-8") -> None:
    with tarfile.open(file, mode, encoding=encoding, format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def texts(index: EpisodeIndex) -> dict[str, str]:
    found = {index.id(e).rpartition("/")[2]: read_episode(index, e).fields for e in range(index.episodes)}
    return {key: str(fields["text"]) for key, fields in found.items() if fields.get("text") is not None}


def both(folder: Path, **options: Any) -> tuple[dict[str, str], dict[str, str], EpisodeIndex, Any]:
    """The texts by key that `convert` and `index` find, the index, and the report of the conversion."""
    report = convert(str(folder), str(folder.parent / "converted"), processes=1, **options)
    index = index_foreign(str(folder), str(folder.parent / "indexed"))
    return texts(EpisodeIndex.open(str(folder.parent / "converted"))), texts(index), index, report


def test_both_find_the_same_captions(tmp_path: Path) -> None:
    members = [
        ("._0.png", b"\0\5\x16\7"),
        (".DS_Store", b"x"),
        ("__MACOSX/0.png", b"x"),
        *[("0.v1.png", picture()), ("0.v1.txt", b"version one")],
        *[("a/1.PNG", picture()), ("a/1.txt", b"\xef\xbb\xbfgr\xc3\xbcn\r\n")],
        *[("2.seg.png", b"x"), ("2.png", picture()), ("2.caption", b"two\r\nlines\r\n")],
        *[("3.png", picture()), ("3.txt", b"\n"), ("3.json", b'\xef\xbb\xbf{"prompt": "from json\\n", "url": "u"}')],
    ]
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s/0.tar", members)
    converted, indexed, _, report = both(tmp_path / "s")
    assert converted == indexed == {"0": "version one", "1": "grün", "2": "two\nlines", "3": "from json"}
    assert [n.partition(" (")[0] for n in report.notes] == [
        *("left out: members .seg.png", "left out: members .txt", "left out: url in .json")
    ]


def test_samples_without_a_use_are_counted_and_named(tmp_path: Path) -> None:
    members = [
        ("first.txt", b"no picture"),
        *[("good.png", picture()), ("good.txt", b"good")],
        *[("cp1252.png", picture()), ("cp1252.txt", "größe".encode("cp1252"))],
        *[("utf16.png", picture()), ("utf16.txt", "größe".encode("utf-16"))],
        ("bare.png", picture()),
        *[("two.v1.png", picture()), ("two.v2.png", picture()), ("two.txt", b"two")],
        *[("broken.png", picture()), ("broken.json", b"{")],
        *[("nul.png", picture()), ("nul.txt", b"a\0b")],
        *[("half.png", picture()), ("half.json", b'{"text": "\\ud800"}')],
    ]
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s/0.tar", members)
    with pytest.raises(DataError, match=r"sample 'first'.*has no picture"):
        convert(str(tmp_path / "s"), str(tmp_path / "bad"), processes=1)
    converted, indexed, index, report = both(tmp_path / "s", skip_bad=True)
    assert converted == indexed == {"good": "good"}
    said = {
        "first": "has no picture",
        "cp1252": r"its .txt is not UTF-8: byte 2 is 0xF6",
        "utf16": "UTF-16",
        "bare": "has no caption",
        "two": "several pictures (.v1.png, .v2.png)",
        "broken": "not valid JSON",
        "nul": "NUL",
        "half": "surrogate",
    }
    assert index.document["skipped"] == len(said) - 1  # a picture without a caption is kept, and named
    assert index.episodes == 2
    for (key, reason), bad, note in zip(said.items(), report.bad, index.document["notes"], strict=True):
        assert f"{key!r}" in str(bad)
        assert reason in str(bad)
        assert f"0.tar, sample {key!r}" in note
        assert reason in note


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    members = [("größe.png", picture()), ("größe.txt", b"x"), ("0.png", picture()), ("0.txt", b"y")]
    write_tar(tmp_path / "s/0.tar", members, encoding="cp1252")
    converted, indexed, index, report = both(tmp_path / "s", skip_bad=True)
    assert converted == indexed == {"0": "y"}
    assert "its name in the tar is not UTF-8" in str(report.bad[0])
    assert "its name in the tar is not UTF-8" in index.document["notes"][0]


def test_compressed_tars_are_converted_but_not_indexed(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write_tar(tmp_path / "s/1.tar.gz", [("1.png", picture()), ("1.txt", b"one")], mode="w:gz")
    with pytest.raises(DataError, match=r"1\.tar\.gz: samples inside a compressed archive cannot be indexed"):
        index_foreign(str(tmp_path / "s"), str(tmp_path / "none"))
    convert(str(tmp_path / "s"), str(tmp_path / "out"), processes=1)
    assert texts(EpisodeIndex.open(str(tmp_path / "out"))) == {"1": "one"}


def test_documents_follow_the_same_rule(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    (folder / "__MACOSX").mkdir(parents=True)
    (folder / "__MACOSX/a.txt").write_bytes(b"x")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf  one\r\n\r\n  two\r\n")
    (folder / "b.txt").write_bytes("größe".encode("cp1252"))
    report = convert(str(folder), str(tmp_path / "out"), processes=1, skip_bad=True)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    assert read_episode(index, 0).fields["text"] == "  one\n\n  two"
    assert [str(b).partition("s/")[2] for b in report.bad] == [
        "b.txt, document 0 is not UTF-8: byte 2 is 0xF6; save it as UTF-8, or leave it out"
    ]


def test_json_lines_with_a_mark_and_other_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "\\ufeffone\\r\\n", "url": "u"}\r\n{"text": "two"}\r\n')
    report = convert(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), processes=1)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    assert [read_episode(index, e).fields["text"] for e in range(2)] == ["one", "two"]
    assert [n.partition(" (")[0] for n in report.notes] == ["left out: url"]


def test_texts_of_any_bytes_are_read_exactly_or_refused() -> None:
    assert clean_text(decode_text(b"\xef\xbb\xbf\r\n a\rb\r\n\r\n", "x"), "x") == " a\nb"
    for bad in (b"\xff\xfe", b"a\xc3", b"\xed\xa0\x80"):
        with pytest.raises(DataError, match="x is"):
            decode_text(bad, "x")
