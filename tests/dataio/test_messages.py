"""Text for people has no secrets, and nothing that a terminal, a table or a page would obey."""

from __future__ import annotations

import pytest

from tiphys.dataio.messages import printable, redacted
from tiphys.dataio.upkeep.verify import Report
from tiphys.launch.display import scores, table

NAME = "a\x1b[2J\x9b1mb\u202ec"


@pytest.mark.parametrize(
    "text",
    [
        "https://user:secret@host/x",
        "GET https://host/x?sig=secret failed",
        "X-Amz-Signature=secret&x",
        "AccountKey=secret;",
        "url 'https://host/a?X-Amz-Credential=secret'",
    ],
)
def test_messages_have_no_secrets(text: str) -> None:
    assert "secret" not in redacted(text)


def test_names_cannot_control_a_terminal() -> None:
    assert printable(NAME + "\n\t") == "a\\x1b[2J\\x9b1mb\\u202ec\n\t"
    assert printable("a\nb", "") == "a\\nb"
    assert printable("näher 火 ' \"") == "näher 火 ' \""
    report = Report("data")
    report.add("checksum", NAME, NAME, NAME)
    assert "\x1b" not in str(report)


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[link=file:///etc/passwd]x[/link]", NAME])
def test_names_are_no_markup_in_tables(name: str) -> None:
    assert printable(name, "") in table(["task"], [[name]])


def test_an_evaluation_says_which_scores_it_lacks():
    played = {"objective": "bc", "episodes": 4, "mean_return": 5.0, "success_rate": None, "expert_normalized": None}
    assert "not normalised, because" not in scores({"tasks": {"cart": played | {"random": 1.0, "expert": 9.0}}})
    note = scores({"tasks": {"cart": played | {"random": 1.0, "expert": None}}}).splitlines()[-1]
    assert note.startswith("not normalised, because the mean scores")
    assert "unknown: cart; state them as `random` and `expert` in a mapping file" in note
