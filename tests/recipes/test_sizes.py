"""One way to write a size."""

import pytest

from tiphys.recipes.sizes import parse_size


@pytest.mark.parametrize(
    "text, expected",
    [("4096", 4096), ("500MB", 500_000_000), ("8GiB", 8 << 30), ("1.5k", 1500), (" 2 TiB ", 2 << 40), ("0GiB", 0)],
)
def test_a_size_is_read(text, expected):
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1MB", "5 apples", "1e3", "nan"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
