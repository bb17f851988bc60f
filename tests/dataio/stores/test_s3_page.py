"""docs/s3.md is true: its example works, its permissions are those that are used, and its messages are those of the product."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("moto", reason="needs the dev extra")

import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tests.launch.small_recipe import GOLDEN
from tests.processes import REPOSITORY
from tests.servers import Answer, Fault, FaultyFront, Request, moto_server, s3_environment
from tests.test_docs import blocks
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.export import export
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.storage import Store
from tiphys.launch.cli import main
from tiphys.launch.statuses import Status
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.follow.follower import Follower
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.publish import How, publish, save_policy

PAGE = REPOSITORY / "docs" / "s3.md"
TEXT = PAGE.read_text(encoding="utf-8")


class Watched:
    """A store that notes the S3 actions that its requests need."""

    def __init__(self, front: FaultyFront) -> None:
        self.front, self.used = front, set[str]()
        front.rule = lambda request: Fault(change=partial(self.note, request))

    def note(self, request: Request, answer: Answer) -> Answer:
        key = request.path.partition("?")[0].count("/") > 1 and not request.path.endswith("?delete")
        if not key:
            self.used.add("s3:DeleteObject" if request.method == "POST" else "s3:ListBucket")
        elif answer.status == 404 and request.method != "DELETE":
            self.used |= {"s3:GetObject", "s3:ListBucket"}
        else:
            verbs = {"GET": "Get", "HEAD": "Get", "PUT": "Put", "POST": "Put", "DELETE": "Delete"}
            self.used.add(f"s3:{verbs[request.method]}Object")
        return answer

    def of(self, work: Callable[[], object]) -> set[str]:
        self.used.clear()
        work()
        return set(self.used)


@pytest.fixture(scope="module")
def store() -> Iterator[Watched]:
    with moto_server() as endpoint, FaultyFront(endpoint) as front, s3_environment(front.url):
        yield Watched(front)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    of = fixtures.make([fixtures.ARM], "bc", context=60, scheme="compact")
    for step in (1, 2):
        model = acting.model(of, step)
        config = DecisionConfig(**{k: v for k, v in model.config.to_dict().items() if k != "auto_map"})
        to = tmp_path_factory.mktemp("runs") / "cart" / "policy"
        made.append(save_policy(to, model.state_dict(), config, of.processor(), step=step))
    return made


def permitted(begins: str) -> set[str]:
    (row,) = [line for line in TEXT.splitlines() if line.startswith(f"| {begins}")]
    return set(re.findall(r"`(s3:\w+)`", row.split("|")[2]))


def test_the_example_works(
    store: Watched, policies: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(policies[0].parents[2])
    export(str(GOLDEN / "cart"), "demonstrations", format="npz")
    Path("cart.yaml").write_text(next(blocks(PAGE, "yaml")))
    Path("runs").mkdir(exist_ok=True)
    if not Path("runs/cart").exists():
        Path("runs/cart").symlink_to(policies[0].parent)
    for line in next(blocks(PAGE, "sh")).splitlines():
        if line.startswith("tiphys "):
            assert main(shlex.split(line)[1:]) == Status.DONE, capsys.readouterr().err


def test_the_permissions_are_those_that_are_used(store: Watched, policies: list[Path], tmp_path: Path) -> None:
    export(str(GOLDEN / "cart"), str(tmp_path / "source"), format="npz")
    data, to = "s3://bucket/actions/data", "s3://bucket/actions/policy"
    convert = ["convert", str(tmp_path / "source"), data, "--from", "npz", "--processes", "1"]
    assert store.of(lambda: main(convert)) == permitted("write a dataset")

    def read() -> None:
        index = EpisodeIndex.open(data)
        read_episode(index, 0)
        assert main(["inspect", data]) == Status.DONE

    assert store.of(read) <= permitted("read a dataset")
    published = store.of(lambda: [publish(folder, to, how=How(grace=0)) for folder in policies * 3])
    assert published == permitted("publish a policy")
    assert store.of(lambda: Policy.load(to, "cpu")) <= permitted("load a policy")
    follower = Follower(to)
    assert store.of(lambda: (follower.fetch(), follower.poll())) <= permitted("follow a policy")


@pytest.mark.parametrize(
    ("bucket", "message"), [("nobody", "there is no such bucket"), ("bucket", "there is no dataset")]
)
def test_a_dataset_that_is_not_there(store: Watched, bucket: str, message: str) -> None:
    Store("s3://bucket/other").write("a", b"")
    with pytest.raises(OSError, match=f"s3://{bucket}/none.*: {message}"):
        EpisodeIndex.open(f"s3://{bucket}/none")


def test_the_messages_are_those_of_the_product() -> None:
    table = TEXT.partition("## What errors mean")[2]
    phrases = [p for line in table.splitlines() if line.startswith('| "') for p in re.findall('"([^"]+)"', line)]
    files = [p for name in ("dataio", "pretrain") for p in (REPOSITORY / name).rglob("*.py")]
    sources = "".join(p.read_text(encoding="utf-8") for p in files)
    written = sources.replace("{what}", "read") + sources.replace("{what}", "written")
    assert len(phrases) > 8
    assert [p for p in phrases if p not in written] == []
