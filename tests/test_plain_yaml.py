"""YAML that people write becomes plain values, or an error that names the line; texts survive being written and read."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiphys.paths import expand, local
from tiphys.plain_yaml import YamlError, dump, read

BOMB = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]" for p, n in zip("abcdefgh", "bcdefghi")),
    ]
)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BOMB, "f:1: &a is an anchor"),
        ("a: &a [*a]", "f:1: &a is an anchor"),
        ("a: *b", r"f:1: \*b is an alias"),
        ("[" * 3000, "nested|nesting"),
        ("- " * 3000, "f:1: nested more than 24 levels deep"),
        ("\n".join(" " * i + "a:" for i in range(300)), "f:26: nested more than 24 levels deep"),
        ("a: [" + "1," * 30_000 + "]", "more than 20000 values"),
        ("a: '" + "x" * (1 << 20) + "'", "is larger than 1048576 bytes"),
        (
            "x: 1\na: !!python/object/apply:os.system [ls]",
            "f:2: tag:yaml.org,2002:python/object/apply:os.system is a tag",
        ),
        ("a: !mine 3", "!mine is a tag"),
        ("a: 1\nb: 2\na: 3\n", "f:3: a: this key appears twice, first on line 1"),
        ("s:\n  k: 1\n  'k': 2\n", "f:3: s.k: this key appears twice, first on line 2"),
        ("a: 1\n<<: {b: 2}", "f:2: << merges mappings"),
        ("? [a, b]\n: 1", "f:1: a key must be a text"),
        ("a: 1\n---\na: 2", "f:2: a second document"),
        ("a:\n\tb: 1", "f:2: not YAML.*spaces, not with tabs"),
        ("a: [1", "f:2: not YAML"),
        ("day: 2024-01-02", 'f:1: day: 2024-01-02 can be read as a date; write it in quotes, "2024-01-02"'),
        ("a: Nan", '"Nan"'),
        ("a: [1, -Infinity]", r"a\[1\]: -Infinity can be read as a number that is not finite"),
        ("at: 12:30", "a number in base 60"),
        ("a: 010", "an octal number"),
        ("a: " + "9" * 5000, "a number of 5000 characters"),
        ("a: 1e999", "too large for a number"),
        ("name: é".encode("cp1252"), r"f:1: is not UTF-8: byte 6 \(0xe9\); save it as UTF-8 \(it may be Windows-1252"),
        ("name: x".encode("utf-16"), "f: is UTF-16 or UTF-32"),
        ("name: x".encode("utf-16-le"), "f: is UTF-16 or UTF-32"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "f: is not a text file"),
        ("a: \x07", "f: not YAML"),
    ],
)
def test_what_is_refused_names_the_file_the_line_and_the_way_out(data: bytes | str, words: str) -> None:
    with pytest.raises(YamlError, match=words):
        read(data, "f")


def test_all_disputed_words_and_repeated_keys_are_reported_at_once() -> None:
    with pytest.raises(YamlError) as caught:
        read("a: NaN\nb: 2024-1-1\na: 1\n", "f")
    assert [line.split(": ")[0] for line in caught.value.errors] == ["f:1", "f:2", "f:3"]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-5", 1e-5),
        ("5_000", 5000),
        ("0x10", 16),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("on", True),
        ("No", False),
        ("~", None),
        ("", None),
    ]
    + [(word, word) for word in ("e5", "1e", "0o", "y", "n", "1_0.5", "v1.2.3", "=", ".")],
)
def test_a_word_without_quotes(word: str, value: object) -> None:
    assert read(f"key: {word}", "f").values == {"key": value}
    assert read(f"key: {word}\r\n".encode("utf-8-sig"), "f").values == {"key": value}


LIKE_OTHERS = st.sampled_from(
    "1e5 1E5 1_000 0x1f 010 1:30 .5 5. +1 -.inf .NaN nan Infinity yes No ON off y true Null ~ 2024-01-02 2024-1-2T03:04Z".split()
) | st.from_regex(r"[-+]?[0-9._:eExob-]{1,8}", fullmatch=True)
TEXTS = LIKE_OTHERS | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    TEXTS
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS.filter(lambda k: k != "<<"), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(VALUES)
@example(
    {
        "a": [
            "1e5",
            "no",
            "2024-01-01",
            "Nan",
            "~",
            "",
            " x ",
            "a\nb",
            "a: b",
            "# c",
            "\u2028\x85\ufeff",
            "{",
            "&a",
            "*a",
            "!x",
        ]
    }
)
def test_values_survive_being_written_and_read(value: object) -> None:
    found = read(dump({"key": value}), "f").values["key"]
    assert found == value
    assert repr(found) == repr(value)  # 1, 1.0 and True are equal


def test_the_same_list_twice_is_written_out() -> None:
    shared = ["x"]
    assert read(dump({"a": shared, "b": shared}), "f").values == {"a": ["x"], "b": ["x"]}


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [expand(p) for p in ("~", "~/x", "a/~", "s3://b/~", "")] == ["/home/me", "/home/me/x", "a/~", "s3://b/~", ""]
    assert local("file:///a%20b") == "/a b"
    assert local("file://localhost/a") == "/a"
    with pytest.raises(ValueError, match="~nobody-here has no home folder"):
        expand("~nobody-here/x")
    for url in ("file://~/data", "file:~/data", "file://data/x"):
        with pytest.raises(ValueError, match="a file URL holds a complete path"):
            local(url)
