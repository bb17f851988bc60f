"""Chunks: lossless kinds restore the rows, lossy ones nearly. Damaged and oversized chunks are refused."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.format import priority
from tiphys.dataio.format.encodings import EXTENSIONS, Encoding, choose, decode, encode

SHAPES = [(8, 6, 3), (3, 8, 6), (8, 6), (8, 6, 1), (4, 9, 7), (9, 7, 4), (1, 5, 2)]


def smooth(rows, shape, seed=0):
    """Pictures that a lossy codec changes little: slow waves that move a little from row to row."""
    t = np.arange(rows).reshape(-1, *[1] * len(shape))
    axes = [np.arange(n).reshape([1] + [-1 if i == k else 1 for i in range(len(shape))]) for k, n in enumerate(shape)]
    return (128 + 60 * np.sin(sum(a * 0.15 for a in axes) + t * 0.1 + seed)).astype(np.uint8)


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("frames", [1, 3])
def test_lossless_pictures_of_any_shape_come_back_unchanged(kind, shape, frames):
    rows = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)
    chunks = encode(rows, Encoding(kind, frames))
    assert len(chunks) == -(-7 // frames)
    back = [decode(c, kind, min(frames, 7 - i * frames), shape) for i, c in enumerate(chunks)]
    assert np.array_equal(np.concatenate(back), rows)


@pytest.mark.parametrize("kind", ["jpeg", "webp-lossy", "h264", "av1"])
@pytest.mark.parametrize("shape", [(66, 70, 3), (65, 71, 3), (64, 64)])
def test_lossy_pictures_differ_little(kind, shape):
    rows = smooth(5, shape)
    chunks = encode(rows, Encoding(kind, 3, 90))
    back = np.concatenate([decode(chunks[0], kind, 3, shape), decode(chunks[1], kind, 2, shape)])
    assert back.shape == rows.shape
    assert back.dtype == np.uint8
    assert np.abs(back.astype(int) - rows).mean() < 6


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=9), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_texts_come_back_unchanged(texts, frames):
    rows = np.array(texts, np.dtypes.StringDType())
    chunks = encode(rows, Encoding("text", frames))
    back = [t for i, c in enumerate(chunks) for t in decode(c, "text", min(frames, len(texts) - i * frames), ())]
    assert back == texts


def test_the_default_is_lossless():
    def image(shape, dtype="uint8"):
        return choose(FieldSpec("x", "observation", "image", dtype, shape), {}).kind

    assert image((64, 64, 3)) == "webp"
    assert image((84, 84)) == "png"
    assert image((4, 84, 84)) == "png"
    assert image((64, 64, 3), "float32") == "raw"
    assert image((2, 64, 64, 3)) == "raw"
    assert choose(FieldSpec("x", "observation", "continuous", "float32", (5000,)), {}).kind == "raw"
    assert choose(FieldSpec("x", "text", "text", "str"), {"*": Encoding("png")}).kind == "text"


def test_the_first_matching_pattern_decides_and_an_impossible_encoding_is_refused():
    field = FieldSpec("observation.image", "observation", "image", "uint8", (8, 8, 3))
    assert choose(field, {"observation.*": Encoding("jpeg"), "*": Encoding("png")}).kind == "jpeg"
    depth = FieldSpec("observation.depth", "observation", "image", "float32", (8, 8))
    with pytest.raises(DataError, match=r"observation\.depth.*png"):
        choose(depth, {"*": Encoding("png")})
    with pytest.raises(DataError, match="none of"):
        Encoding("zip")


def picture(kind, size):
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind)
    return out.getvalue()


def test_a_chunk_of_another_size_or_format_is_refused():
    good = picture("PNG", (6, 8))
    assert decode(good, "png", 1, (8, 6, 3)).shape == (1, 8, 6, 3)
    with pytest.raises(DataError, match="8×6"):
        decode(good, "png", 1, (8, 8, 3))
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(good, "webp", 1, (8, 6, 3))  # the named format decides, not the content
    with pytest.raises(DataError):
        decode(good[:45], "png", 1, (8, 6, 3))


def test_a_decompression_bomb_is_refused_by_its_header():
    bomb = bytearray(picture("PNG", (6, 8)))
    bomb[16:24] = (9000).to_bytes(4, "big") * 2  # width, height in IHDR
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="9000×9000"):
        decode(bytes(bomb), "png", 1, (0, 0, 3))


def test_pictures_of_any_size_are_decoded_if_the_field_allows_it():
    assert decode(picture("JPEG", (31, 17)), "jpeg", 1, (0, 0, 3)).shape == (1, 17, 31, 3)


@pytest.mark.parametrize("kind", [k for k in EXTENSIONS if k != "raw"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_damaged_chunks_give_clean_errors(kind, data):
    shape = () if kind == "text" else (16, 16, 3)
    chunk = bytearray(_chunk(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        chunk[data.draw(st.integers(0, len(chunk) - 1))] = data.draw(st.integers(0, 255))
    chunk = chunk[: data.draw(st.integers(0, len(chunk)))]
    try:
        rows = decode(bytes(chunk), kind, 2, shape)
    except DataError:
        return
    assert rows.shape == (2, *shape)


_CHUNKS: dict[str, bytes] = {}


def _chunk(kind):
    if kind not in _CHUNKS:
        rows = np.array(["one", "two"], np.dtypes.StringDType()) if kind == "text" else smooth(2, (16, 16, 3))
        _CHUNKS[kind] = encode(rows, Encoding(kind, 2))[0]
    return _CHUNKS[kind]


def test_videos_are_the_same_bytes_each_time():
    rows = smooth(4, (32, 32, 3))
    for kind in ("h264", "av1"):
        assert encode(rows, Encoding(kind, 4)) == encode(rows, Encoding(kind, 4))


def test_pictures_of_16_bits_are_refused():
    """Pillow would clip their values to 255."""
    out = io.BytesIO()
    Image.fromarray(np.full((8, 6), 300, np.uint16)).save(out, "PNG")
    with pytest.raises(DataError, match="more than 8 bits"):
        decode(out.getvalue(), "png", 1, (8, 6, 3))


def growing_video(small, large, frames):
    """An AV1 whose first frame is small and whose others are large. Its header knows only the first."""
    import av

    sizes = [(1, small), (frames - 1, large)]
    parts = [encode(np.zeros((n, side, side, 3), np.uint8), Encoding("av1", frames))[0] for n, side in sizes]
    out, at = io.BytesIO(), 0
    with priority.kept(), av.open(out, "w", format="mp4") as target:
        stream = target.add_stream("libsvtav1", rate=30, options={"preset": "8", "svtav1-params": "lp=1"})
        stream.width = stream.height = small
        stream.pix_fmt = "yuv420p"
        for part in parts:
            with av.open(io.BytesIO(part)) as source:
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts, at = stream, at * 1000, at * 1000, at + 1
                        target.mux(packet)
    return out.getvalue()


def test_a_frame_larger_than_the_header_claims_is_refused_before_it_is_decoded():
    with pytest.raises(DataError, match=r"result out of range|a frame of"):
        decode(growing_video(64, 1024, 3), "av1", 3, (0, 0, 3))
    with pytest.raises(DataError, match="a frame of 96×96, but claims 64×64"):
        decode(growing_video(64, 96, 3), "av1", 3, (0, 0, 3))
