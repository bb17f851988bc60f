"""Codecs: round trips, edges, and no id outside its range."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.codec import NoEncoding, inverse_mu_law, mu_law
from tiphys.pretrain.tokens.codecs import CODECS, codec_from_dict
from tiphys.pretrain.tokens.id_codecs import Bins, Discrete, Integers, Quantiles, Sign
from tiphys.pretrain.tokens.images import PLACES, from_patches, intervals, places, resized, to_patches
from tiphys.pretrain.tokens.picture_codecs import Grid, Patches, Tiles
from tiphys.pretrain.tokens.vector_codecs import Affine, Chunk, Histogram, Vector

FIRST = 5000
quick = settings(deadline=None, max_examples=50)  # a slow machine is not a failure
EXAMPLES = {
    "discrete": Discrete("", (2,), FIRST, (7, 3), (0, -1)),
    "bins": Bins("", (3,), FIRST, 1024, (-2.0, 0.0, 5.0), (2.0, 1.0, 6.0)),
    "quantiles": Quantiles("", (2,), FIRST, ((0.0, 1.0, 4.0), (-1.0, 0.0, 0.5))),
    "patches": Patches("patch:3", (20, 40, 3), crop=18, resize=24),
    "vector": Vector("vector:o:2", (2,), (1.0, -1.0), (2.0, 0.5)),
    "affine": Affine("vector:a:2", (2,), (-1.0, 0.0), (1.0, 4.0)),
    "chunk": Chunk("vector:a:2x2:3:flow", (2,), 2, 3, (-1.0, 0.0), (1.0, 4.0), "flow", 8, 1, 2, 10),
    "grid": Grid("grid:g:2x3x2", (2, 3, 2), (11,)),
    "tiles": Tiles("tile:g:1x3x2", (2, 3, 2), (11,), (2,), tile=(1, 3)),
    "integers": Integers("", (2,), FIRST, -3, 9),
    "sign": Sign("", (2,), FIRST),
    "histogram": Histogram("vector:histogram:reward:4", (4,)),
}
any_float = st.floats(allow_nan=False, width=32)


def test_examples_cover_every_codec():
    assert EXAMPLES.keys() == CODECS.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_json_round_trip(kind):
    codec = EXAMPLES[kind]
    assert codec_from_dict(json.loads(json.dumps(codec.to_dict()))) == codec


def test_the_error_for_an_unknown_codec_names_it():
    with pytest.raises(DataError, match="'wavelet'"):
        codec_from_dict({"kind": "wavelet", "embedder": "", "shape": []})


@quick
@given(hnp.arrays(np.float64, 20, elements=st.floats(-256, 256)))
def test_mu_law_round_trip(x):
    y = mu_law(x)
    assert (np.abs(y) <= 1).all()
    assert np.allclose(inverse_mu_law(y), x, rtol=1e-9, atol=1e-12)


def test_mu_law_is_that_of_the_paper():
    x = np.array([0.0, 1.0, -1.0, 256.0, -256.0])
    expected = [0.0, np.log(101) / np.log(25601), -np.log(101) / np.log(25601), 1.0, -1.0]
    assert np.allclose(mu_law(x), expected)


GATO = Bins("", (1,), FIRST, 1024, companded=True)


@pytest.mark.parametrize(
    ("value", "bin_"),
    [(0.0, 512), (256.0, 1023), (-256.0, 0), (np.inf, 1023), (-np.inf, 0), (1e30, 1023), (-257.0, 0), (-1e-9, 511)],
)
def test_gato_edges(value, bin_):
    for dtype in (np.float32, np.float64):
        assert GATO.encode(np.array([[value]], dtype)).tolist() == [[FIRST + bin_]]


@quick
@given(hnp.arrays(np.float32, (4, 3), elements=any_float), st.booleans())
def test_ids_of_bins_stay_in_their_range_and_decode_to_the_same_bin(x, companded):
    codec = Bins("", (3,), FIRST, 1024, (-2.0, 0.0, 5.0), (2.0, 1.0, 6.0), companded, "float64")
    ids = codec.encode(x)
    assert ((ids >= FIRST) & (ids < FIRST + 1024)).all()
    assert (codec.encode(codec.decode(ids)) == ids).all()


@quick
@given(hnp.arrays(np.float64, (5, 2), elements=st.floats(0, 1)))
def test_affine_bins_are_exact_to_half_a_bin(share):
    low, high = np.array([-3.0, 10.0]), np.array([5.0, 10.5])
    codec = Bins("", (2,), FIRST, 1024, tuple(low), tuple(high), dtype="float64")
    x = low + share * (high - low)
    assert (np.abs(codec.decode(codec.encode(x)) - x) <= (high - low) / 2048 + 1e-12).all()


@quick
@given(hnp.arrays(np.float64, (6, 2), elements=st.floats(allow_nan=False)))
def test_ids_of_quantiles_stay_in_their_range_and_decode_to_the_same_bin(x):
    codec = Quantiles("", (2,), FIRST, ((0.0, 1.0, 4.0, 9.0), (-1.0, 0.0, 0.5, 8.0)), "float64")
    ids = codec.encode(x)
    assert ((ids >= FIRST) & (ids < FIRST + 3)).all()
    assert (codec.encode(codec.decode(ids)) == ids).all()


def test_an_edge_belongs_to_the_bin_above_it_and_the_last_bin_includes_its_end():
    x = np.array([[0.0, -1.0], [1.0, 0.0], [4.0, 0.5]])
    assert (EXAMPLES["quantiles"].encode(x) - FIRST).tolist() == [[0, 0], [1, 1], [1, 1]]
    uniform = Bins("", (), FIRST, 4, (0.0,), (4.0,))
    assert (uniform.encode(np.array([0.0, 1.0, 2.0, 3.0, 4.0])) - FIRST).ravel().tolist() == [0, 1, 2, 3, 3]


@quick
@given(st.data(), st.lists(st.integers(1, 1024), min_size=1, max_size=4), st.integers(-5, 5))
def test_discrete_round_trip(data, counts, low):
    codec = Discrete("", (len(counts),), FIRST, tuple(counts), (low,))
    x = np.array([[low + data.draw(st.integers(0, n - 1)) for n in counts] for _ in range(3)])
    ids = codec.encode(x)
    assert all(a <= i < b for row in ids for i, (a, b) in zip(row, codec.choices(), strict=True))
    assert (codec.decode(ids) == x).all()


@pytest.mark.parametrize("value", [3, -1, 2.5, np.inf, 1 << 40])
@pytest.mark.parametrize("make", [lambda v: Discrete("", (), FIRST, (3,)), lambda v: Grid("g", (1, 1), (3,))])
def test_a_discrete_value_that_does_not_exist_is_refused(value, make):
    codec = make(value)
    x = np.array([1, value]).reshape(2, *codec.shape)
    with pytest.raises(NoEncoding) as caught:
        codec.encode(x)
    assert caught.value.at == 1


@pytest.mark.parametrize("share", [0.02, 0.4, 1.0])
def test_bins_of_quantiles_decode_into_themselves_and_values_that_occur_often_exactly(share):
    """Rewards of which most are 0 or 1: with equal edges, most bins would decode into another one."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(5000) < share, np.round(rng.normal(size=5000), 1) if share < 1 else 1.0, 0.0)
    x = x.astype(np.float32)  # as the statistics keep values
    edges = Quantiles.merged(np.quantile(x, np.linspace(0, 1, 101), method="lower"))
    codec = Quantiles("", (), FIRST, (edges,))
    ids = np.arange(len(edges) - 1)[:, None] + FIRST
    assert codec.choices() == ((FIRST, FIRST + len(edges) - 1),)
    again = codec.encode(codec.decode(ids))
    assert np.array_equal(again, ids)
    values, counts = np.unique(x, return_counts=True)
    often = values[counts > 0.03 * len(x)]
    assert len(often)
    assert np.array_equal(codec.decode(codec.encode(often)), often)


def test_entries_may_have_different_numbers_of_bins():
    codec = Quantiles("", (2,), FIRST, (Quantiles.merged(np.zeros(9)), (0.0, 1.0, 2.0, 3.0)))
    assert codec.choices() == ((FIRST, FIRST + 1), (FIRST, FIRST + 3))
    x = np.array([[0.0, 2.5], [7.0, -9.0]], np.float32)
    assert codec.decode(codec.encode(x)).tolist() == [[0.0, 2.5], [0.0, 0.5]]


@pytest.mark.parametrize("kind", ["bins", "quantiles", "vector", "affine", "discrete"])
def test_the_error_for_nan_says_at_which_step_it_is(kind):
    x = np.zeros((4, *EXAMPLES[kind].shape))
    x[2, -1] = np.nan
    with pytest.raises(NoEncoding, match="NaN") as caught:
        EXAMPLES[kind].encode(x)
    assert caught.value.at == 2


@quick
@given(hnp.arrays(np.float32, (3, 4), elements=any_float))
def test_vectors_are_finite_and_decode_within_their_limit(x):
    mean, std = (0.0, 10.0, -5.0, 1.0), (1.0, 3.0, 0.1, 100.0)
    codec = Vector("vector:o:4", (4,), mean, std, "float64")
    value = codec.encode(x)
    assert value.shape == (3, 1, 8)
    assert np.isfinite(value).all()
    assert np.abs(value[..., 4:]).max() <= 1
    inside = np.clip(x, np.array(mean) - 10 * np.array(std), np.array(mean) + 10 * np.array(std))
    assert np.allclose(codec.decode(value), inside, rtol=1e-5, atol=1e-4)


@quick
@given(hnp.arrays(np.float32, (3, 2), elements=any_float))
def test_affine_vectors_are_clamped_to_their_bounds(x):
    codec = Affine("vector:a:2", (2,), (-1.0, 0.0), (1.0, 4.0), 1.0, "float64")
    value = codec.encode(x)
    assert np.abs(value).max() <= 1
    assert np.allclose(codec.decode(value), np.clip(x, [-1, 0], [1, 4]), atol=1e-6)


@quick
@given(hnp.arrays(np.uint8, (2, 2, 3, 2), elements=st.integers(0, 10)))
def test_grids_round_trip(x):
    codec = EXAMPLES["grid"]
    assert (codec.decode(codec.encode(x)) == x).all()
    for tile, tokens in (((1, 3), 2), ((1, 1), 6), ((2, 1), 3)):
        cut = Tiles("t", (2, 3, 2), (11,), tile=tile)
        assert cut.tokens == tokens
        assert (cut.decode(cut.encode(x)) == x).all()


def test_tiles_are_in_raster_order():
    grid = np.arange(42, dtype=np.uint8).reshape(1, 6, 7)
    cells = Tiles("t", (6, 7), (42,)).encode(grid)
    assert cells.shape == (1, 42, 1, 1, 1)
    assert cells.ravel().tolist() == list(range(42))
    rows = Tiles("t", (6, 7), (42,), tile=(1, 7)).encode(grid)
    assert rows.shape == (1, 6, 1, 7, 1)
    assert (rows[0, :, 0, :, 0] == grid[0]).all()
    assert Tiles("t", (6, 7), (42,), tile=(3, 7)).encode(grid)[0, 1].ravel().tolist() == list(range(21, 42))


@pytest.mark.parametrize("tile", [(2, 3), (0, 1), (1, 8), (1,)])
def test_tiles_that_do_not_cover_the_grid_are_refused(tile):
    with pytest.raises(DataError, match="do not cover a grid"):
        Tiles("t", (6, 7), (42,), tile=tile)


@quick
@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]))
    )
)
def test_patches_round_trip(images):
    codec = Patches(f"patch:{images.shape[-1]}", images.shape[1:])
    value = codec.encode(images)
    assert value.shape == (len(images), codec.tokens, 16, 16, images.shape[-1])
    assert np.abs(value).max() <= 0.25  # [-1, 1] over √16
    assert (codec.decode(value) == images).all()


def test_patches_are_in_raster_order():
    image = np.zeros((1, 32, 48, 1), np.uint8)
    for number in range(6):
        row, column = divmod(number, 3)
        image[0, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = number * 40
    patches = to_patches(image)
    for number in range(6):
        assert np.allclose((patches[0, number] * 4 + 1) * 127.5, number * 40, atol=1e-3)
    assert (from_patches(patches, 32, 48) == image).all()


def test_channels_first_and_float_images_give_the_same_patches():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 16, 20, 3)).astype(np.uint8)
    plain = Patches("patch:3", (16, 20, 3)).encode(image)
    assert (Patches("patch:3", (3, 16, 20), channels_first=True).encode(np.moveaxis(image, -1, 1)) == plain).all()
    floats = (image / 255).astype(np.float32)
    assert (Patches("patch:3", (16, 20, 3), white=1.0).encode(floats) == plain).all()


def test_resize_keeps_constant_images_and_averages_when_it_shrinks():
    assert (resized(np.full((1, 37, 21, 3), 77, np.uint8), 16) == 77).all()
    checks = np.indices((64, 64)).sum(0) % 2 * 200
    small = resized(checks[None, :, :, None].astype(np.uint8), 8)
    assert np.abs(small.astype(int) - 100).max() <= 2
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))[None, :, :, None]
    assert (np.diff(resized(ramp, 16)[0, 8, :, 0].astype(int)) > 0).all()


@quick
@given(st.integers(1, 700), st.integers(1, 700))
def test_intervals_of_places_are_ordered_and_within_the_bins(height, width):
    spans = intervals(height, width)
    assert spans.min() >= 0
    assert spans.max() < PLACES
    assert (spans[:, 0] <= spans[:, 1]).all()
    assert (spans[:, 2] <= spans[:, 3]).all()


def test_places_are_random_in_training_and_in_the_middle_otherwise():
    spans = np.tile(intervals(32, 32), (500, 1))
    row, position = np.repeat(np.arange(500), 4), np.tile(np.arange(4), 500)
    drawn = places(spans, 7, 3, row, position, True)
    assert ((drawn >= spans[:, 0::2]) & (drawn <= spans[:, 1::2])).all()
    first = drawn[position == 0]
    assert len(np.unique(first[:, 0])) == 64  # 128 bins over two rows of patches
    assert abs(first.mean() - 31.5) < 2
    again = places(spans[::-1], 7, 3, row[::-1], position[::-1], True)
    assert (again[::-1] == drawn).all()
    assert (places(spans, 7, 4, row, position, True) != drawn).any()
    assert (
        places(spans, 7, 3, row, position, False) == np.tile([[31, 31], [31, 95], [95, 31], [95, 95]], (500, 1))
    ).all()


@pytest.mark.parametrize("codec", [Bins("", (), FIRST, 1024, (0.0,), (10.0,), dtype="int64")])
def test_integers_come_back_as_they_were(codec):
    """Truncation would give 0, 1, 1, 3, 3, 5, …"""
    values = np.arange(11)
    assert codec.decode(codec.encode(values)).tolist() == values.tolist()


def test_pictures_are_normalised_by_the_range_of_their_field():
    """Depth in millimetres: black is the nearest, white the farthest, and steps of far less than 1/256 of the range remain."""
    codec = Patches("patch:1", (16, 16, 1), black=300.0, white=5300.0)
    depth = np.linspace(300, 5300, 256).reshape(1, 16, 16, 1)
    for dtype in ("uint16", "float32"):
        pixels = codec.encode(depth.astype(dtype))[0, 0, :, :, 0] * 4
        assert np.allclose(pixels, (depth.astype(dtype)[0, :, :, 0] - 300) / 2500 - 1, atol=1e-4)
    beyond = codec.encode(np.array([0, 65535], np.uint16)[:, None, None, None] + np.zeros((1, 16, 16, 1), np.uint16))
    assert [beyond[0].min(), beyond[1].max()] == [-0.25, 0.25]


def test_resizing_16_bits_is_exact():
    full = np.full((1, 37, 21, 1), 65535, np.uint16)
    assert (resized(full, 16) == 65535).all()
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 1000, (64, 1))[None, :, :, None]
    alone = resized(ramp, 16)
    assert (resized(np.concatenate([full[:, :1, :1] + np.zeros_like(ramp), ramp]), 16)[1:] == alone).all()


def test_policies_of_earlier_versions_have_no_black():
    old = Patches("patch:3", (16, 16, 3))
    assert "black" not in old.to_dict()
    for codec in (old, Patches("patch:1", (16, 16, 1), black=300.0, white=5300.0)):
        assert codec_from_dict(codec.to_dict()) == codec


@quick
@given(hnp.arrays(np.float64, (5, 2), elements=st.floats(allow_nan=False)))
def test_integers_and_signs_are_clamped_and_decoded_exactly(x):
    integers, sign = EXAMPLES["integers"], EXAMPLES["sign"]
    assert np.array_equal(integers.decode(integers.encode(x)), np.clip(np.rint(x), -3, 9))
    assert np.array_equal(sign.decode(sign.encode(x)), np.sign(x))
    for codec in (integers, sign):
        ids = codec.encode(x)
        assert all(
            (ids[:, k] >= low).all() and (ids[:, k] < high).all() for k, (low, high) in enumerate(codec.choices())
        )


def test_integers_need_a_range():
    with pytest.raises(DataError, match="low 3 is above high 2"):
        Integers("", (), FIRST, 3, 2)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_integers_of_one_token_come_back_exactly(dtype: str) -> None:
    x = np.arange(60, dtype=dtype).reshape(-1, 3)
    for codec in (
        Vector("vector:f:3", (3,), mean=(7.3,), std=(1.7,), dtype=dtype),
        Affine("vector:f:3", (3,), low=(0.0,), high=(59.0,), dtype=dtype),
    ):
        near = x[:7]  # a vector keeps ten standard deviations
        np.testing.assert_array_equal(codec.decode(codec.encode(near)), near)
