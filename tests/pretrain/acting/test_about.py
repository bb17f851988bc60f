"""What a caption is about: pictures, episodes and values become the observation that the policy is given."""

import numpy as np
import pytest
from PIL import Image

from tests.pretrain.acting import acting_fixtures as acting
from tests.pretrain.token_fixtures import CAPTION, GRID, make_each
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.messages import say
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import cli
from tiphys.pretrain.acting.about import about
from tiphys.pretrain.acting.policy import Policy


@pytest.fixture(scope="module")
def layout():
    return make_each([CAPTION], ["gato"], context=40).layouts[0][0]


def picture(seed=0, size=(16, 16, 3)):
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_picture_is_the_one_field_with_pictures(layout, tmp_path, mode):
    Image.fromarray(picture()).convert(mode).save(tmp_path / "a.png")
    found = about(str(tmp_path / "a.png"), layout)
    assert list(found) == ["image"]
    np.testing.assert_array_equal(found["image"], picture())


def test_the_last_observation_of_an_episode(layout, tmp_path):
    with ShardWriter(str(tmp_path / "data"), [CAPTION]) as writer:
        for i in range(2):
            writer.write(Episode(f"e{i}", "caption", {"image": picture(i)[None], "caption": "x"}, 0))
    found = about(f"{tmp_path / 'data'}:e1", layout)
    assert list(found) == ["image"]
    np.testing.assert_array_equal(found["image"], picture(1))


def test_the_command_says_what_the_policy_says(tmp_path, capsys):
    folder = acting.folder(tmp_path / "policy", make_each([CAPTION], ["gato"], context=40))
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert cli.main(["say", str(folder), "a", "--observation", str(tmp_path / "a.png"), "--temperature", "0"]) == 0
    said = Policy.load(folder).say("a", {"image": picture()}, temperature=0)
    printed = capsys.readouterr().out
    say(f"a{said}")
    assert printed == capsys.readouterr().out


def test_what_the_policy_does_not_see_is_refused(layout, tmp_path):
    for name, image, why in (
        (
            "wide.png",
            Image.fromarray(picture(size=(16, 20, 3))),
            "has 20 × 16 pixels, but the policy sees 16 × 16; resize",
        ),
        ("grey.png", Image.fromarray(picture()).convert("L"), "1 channels of uint8, but the policy sees 3"),
    ):
        image.save(tmp_path / name)
        with pytest.raises(DataError, match=why):
            about(str(tmp_path / name), layout)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="is not a JPEG, PNG or WebP image"):
        about(str(tmp_path / "text.png"), layout)
    with pytest.raises(OSError, match="none"):
        about(str(tmp_path / "none.png"), layout)
    with pytest.raises(DataError, match="is not valid JSON"):
        about("{", layout)
    with pytest.raises(DataError, match="task 'grid' has 0 pictures"):
        about(str(tmp_path / "wide.png"), make_each([GRID], ["bc"], context=200, discretise="no").layouts[0][0])
