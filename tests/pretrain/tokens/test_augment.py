"""Pictures that are changed in training: as Pillow does it, the same in any company, and never when it counts."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tests.pretrain.token_fixtures import CAMERA, make, window
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.tokens.augment import augmented, coefficients, coloured, draws, moved
from tiphys.recipes.sections.objective import Augment, FieldTokens

ALL = Augment(crop=0.8, rotate=20, brightness=0.3, contrast=0.4, saturation=0.5)
FRONT = {"observation.front": FieldTokens(augment=ALL)}
rng = np.random.default_rng(0)
NOISY = rng.integers(0, 256, (2, 40, 56, 3)).astype(np.uint8)


@pytest.mark.parametrize("crop, rotate", [(0.7, 0.0), (1.0, 8.0), (0.6, 15.0)])
def test_moves_are_those_of_pillow(crop: float, rotate: float) -> None:
    height, width = NOISY.shape[1:3]
    (a, b, c), (d, e, f) = coefficients(height, width, crop, rotate, np.array([0.5, 0.4, 0.9]))
    ours = moved(NOISY, (a, b, c), (d, e, f)).astype(int)
    one = 1 << 16  # Pillow's places count from the corner of a pixel
    given = (a / one, b / one, c / one + 0.5 - (a + b) / one / 2, d / one, e / one, f / one + 0.5 - (d + e) / one / 2)
    for picture, mine in zip(NOISY, ours, strict=True):
        theirs = Image.fromarray(picture).transform(
            (width, height), Image.Transform.AFFINE, given, Image.Resampling.BILINEAR
        )
        there = Image.new("L", (width, height), 255).transform(
            (width, height), Image.Transform.AFFINE, given, Image.Resampling.NEAREST
        )
        inside = np.asarray(there) > 0
        assert inside.mean() > 0.8
        assert np.abs(np.asarray(theirs).astype(int) - mine)[inside].max() <= 1


@pytest.mark.parametrize("factor", [0.6, 0.95, 1.3])
@pytest.mark.parametrize("kind", ["Brightness", "Contrast", "Color"])
def test_colours_are_those_of_pillow(kind: str, factor: float) -> None:
    factors = [round(factor * 4096) if name == kind else 4096 for name in ("Brightness", "Contrast", "Color")]
    for picture, mine in zip(NOISY, coloured(NOISY, *factors), strict=True):
        theirs = getattr(ImageEnhance, kind)(Image.fromarray(picture)).enhance(factor)
        assert np.abs(np.asarray(theirs).astype(int) - mine.astype(int)).max() <= 1


def test_nothing_changes_without_a_change() -> None:
    np.testing.assert_array_equal(augmented(NOISY, {}, np.full(6, 0.3)), NOISY)
    turned = moved(NOISY, *coefficients(40, 56, 1.0, 0.0, np.full(3, 0.3)))
    np.testing.assert_array_equal(turned, NOISY)
    assert (augmented(NOISY, vars(ALL), np.full(6, 0.3)) != NOISY).mean() > 0.8


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    made = make([CAMERA], "bc", context=300, fields=FRONT)
    shown = [[window(made, "camera", 3, np.random.default_rng(n)) for n in (row, row + 5)] for row in range(3)]
    key = "embedded/patch:3/value"

    def pictures(rows: list[int], step: int = 2, training: bool = True) -> np.ndarray:
        batch = made.make_batch(step, np.array(rows), [shown[r] for r in rows], seed=4, training=training)
        return batch[key].reshape(len(rows), -1)

    together = pictures([0, 1, 2])
    np.testing.assert_array_equal(pictures([1])[0], together[1])
    np.testing.assert_array_equal(pictures([2, 0]), together[[2, 0]])
    assert (pictures([1], step=3) != pictures([1])).mean() > 0.5

    plain = make([CAMERA], "bc", context=300).make_batch(2, np.array([1]), [shown[1]], seed=4)[key].reshape(1, -1)
    assert (plain != pictures([1])).mean() > 0.5
    np.testing.assert_array_equal(pictures([1], training=False), plain)  # validation
    processor = Processor.from_dict(made.processor())
    acted = processor.encode(processor.layouts["it"]["camera"], [shown[1][:1]]).embedded["patch:3"].value
    np.testing.assert_array_equal(acted.reshape(-1), plain[0, : acted.size])


def test_windows_and_cameras_have_draws_of_their_own() -> None:
    found = [draws(3, 5, np.array([1, 1, 2]), np.array([0, 1, 0]), camera) for camera in (0, 1)]
    assert len(np.unique(np.concatenate(found))) == 2 * 3 * 6


def test_what_is_no_picture_of_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="`augment` is for images, and this field is not encoded as one"):
        make([CAMERA], "bc", context=300, fields={"observation.joints": FieldTokens(augment=ALL)})
    deep = TaskSpec("deep", (FieldSpec("eye", "observation", "image", "uint16", (20, 32, 3)), *CAMERA.fields[5:]))
    with pytest.raises(DataError, match="of uint8 from 0 to 255, not of uint16"):
        make([deep], "bc", context=300, fields={"eye": FieldTokens(augment=ALL)})
    make([CAMERA], "bc", context=300, fields={"observation.*": FieldTokens(augment=ALL)})
