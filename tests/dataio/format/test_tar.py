"""Reading tars that are not trusted: everything but whole, regular files is refused, with its byte."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiphys.dataio.episode import DataError
from tiphys.dataio.format.sample import npy
from tiphys.dataio.format.tar import members, npy_header, samples


def make(file, entries, **options):
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return file


def test_members_are_those_of_tarfile_grouped_to_samples(tmp_path):
    entries = [
        ("a/1.json", b"{}"),
        ("a/1.x.npy", b"abc" * 300),
        ("README", b"r"),
        ("a/2.TXT", b""),
        ("a", (tarfile.DIRTYPE, "")),
    ]
    file = make(tmp_path / "t.tar", entries)
    with tarfile.open(file) as tar:
        assert [(m.name, m.offset, m.size) for m in members(file)] == [
            (m.name, m.offset_data, m.size) for m in tar if m.isfile()
        ]
    one, two = samples(file)
    assert (one.key, list(one.members), one.begin, one.end) == ("a/1", ["json", "x.npy"], 0, 512 * 5)
    assert (two.key, list(two.members)) == ("a/2", ["txt"])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_special_files_are_refused(tmp_path, kind):
    file = make(tmp_path / "t.tar", [("a.json", b"{}"), ("a.txt", (kind, "/etc/passwd"))])
    with pytest.raises(DataError, match=r"byte 1024: 'a\.txt' is a link"):
        list(members(file))


def test_compression_is_refused(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="damaged"):
        list(members(tmp_path / "t.tar"))


def test_a_tar_cut_off_at_any_place_is_refused(tmp_path):
    file = make(tmp_path / "t.tar", [(f"{i}.txt", b"x" * 100 * i) for i in range(6)])
    whole = file.read_bytes()
    end = max(m.offset + 512 for m in members(file))
    for size in [*range(1, end, 512), *range(0, end + 512, 512), end - 100]:
        file.write_bytes(whole[:size])
        with pytest.raises(DataError):
            list(members(file))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_tar_gives_a_clean_error_or_places_inside_it(tmp_path_factory, data):
    file = make(tmp_path_factory.mktemp("t") / "t.tar", [(f"{i}.txt", b"y" * 700) for i in range(3)])
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        for m in members(file):
            assert 0 <= m.offset <= m.offset + m.size <= len(raw)
    except DataError:
        pass


def test_a_name_twice_in_a_sample_is_refused(tmp_path):
    with pytest.raises(DataError, match="twice"):
        list(samples(make(tmp_path / "t.tar", [("1.txt", b"a"), ("1.TXT", b"b")])))


def test_npy_headers_are_read_and_bad_ones_refused():
    array = np.zeros(3, [("a", "<f4", (2,)), ("b", "u1")])
    dtype, shape, size = npy_header(npy(array))
    assert (dtype, shape, size) == (array.dtype, (3,), len(npy(array)) - array.nbytes)
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object), allow_pickle=True)
    fortran = io.BytesIO()
    np.save(fortran, np.asfortranarray(np.zeros((2, 3))))
    for bad in (
        b"",
        b"\x93NUMPY",
        npy(array)[:40],
        objects.getvalue(),
        fortran.getvalue(),
        b"\x93NUMPY\x01\x00\x06\x00{'a':\n",
    ):
        with pytest.raises(DataError):
            npy_header(bad)


def with_extension(file, body, kind=tarfile.XHDTYPE, size=None):
    """A tar whose one member has an extended header with this body."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(body) if size is None else size
    member = tarfile.TarInfo("a.txt")
    padded = body + bytes(-len(body) % 512)
    file.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + padded + member.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    return file


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (b"14 size=-1536\n", tarfile.XHDTYPE, "not read"),
        (b"1" * 300_000, tarfile.XHDTYPE, "300000 bytes"),
        (b"1" * 60_000, tarfile.XHDTYPE, "damaged"),
        (b"1" * 60_000, tarfile.XGLTYPE, "damaged"),
        (b"99 a=b\n", tarfile.XHDTYPE, "damaged"),
        (b"a" * 100_000, tarfile.GNUTYPE_LONGNAME, "100000 bytes"),
        (b"22 GNU.sparse.major=1\n", tarfile.XHDTYPE, "not read"),
        (b"", tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_extended_headers_that_take_for_ever_are_refused(tmp_path, body, kind, reason):
    with pytest.raises(DataError, match=reason):
        list(members(with_extension(tmp_path / "t.tar", body, kind)))


def test_sizes_below_zero_are_refused(tmp_path):
    file = make(tmp_path / "t.tar", [("a.json", b"{}")])
    header = bytearray(file.read_bytes())
    header[124:136] = b"\xff" * 11 + b"\0"  # base 256: negative
    header[148:156] = b"%06o\0 " % sum(bytes(header[:148]) + b" " * 8 + bytes(header[156:512]))
    file.write_bytes(header)
    with pytest.raises(DataError, match=r"claims -"):
        list(members(file))


@pytest.mark.timeout(60)
def test_many_extended_headers_in_a_row_are_refused(tmp_path):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 7
    block = info.tobuf(tarfile.USTAR_FORMAT) + b"7 a=bc\n".ljust(512, b"\0")
    (tmp_path / "t.tar").write_bytes(block * 5000 + bytes(1024))
    with pytest.raises(DataError, match="damaged"):
        list(members(tmp_path / "t.tar"))
