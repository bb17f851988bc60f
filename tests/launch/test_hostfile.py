"""A hostfile is checked, with line numbers, before DeepSpeed and ssh see it."""

from __future__ import annotations

import pytest

from tiphys.launch.cli import main
from tiphys.launch.hosts import HostfileError, check_choice, ranks, read_hosts
from tiphys.launch.submit import launcher


def test_hosts_comments_and_line_ends(tmp_path):
    file = tmp_path / "hosts"
    file.write_bytes(b"# first\r\nworker-0 slots=8\r\n\r\n  10.0.0.2\tslots=4  # slow\r\n")
    assert read_hosts(str(file)) == {"worker-0": 8, "10.0.0.2": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a lots=8", r":1: 'lots=8' is not `slots=8` \(did you mean 'slots'\?\)"),
        ("a slots=1\nb", ":2: host 'b' has no slots; write `b slots=8`"),
        ("a slots=1\n\na slots=2", ":3: host 'a' is already on line 1"),
        ("a slots=0", ":1: slots=0 is not allowed; allowed: a whole number from 1"),
        ("a slots=-1", ":1: slots=-1 is not allowed"),
        ("a slots=eight", ":1: slots=eight is not allowed"),
        ("a slots=99999999999", "is not allowed"),
        ("a slots=8 b", ":1: 'b' stands after the slots"),
        ("a slots = 8", ":1: 'slots' is not `slots=8`|slots= is not allowed"),
        ("-oProxyCommand=id slots=8", ":1: '-oProxyCommand=id' is not the name of a host"),
        ("a;id slots=8", "'a;id' is not the name of a host"),
        ("$(id) slots=8", "is not the name of a host"),
        ("ä slots=8", "is not the name of a host"),
        ("\ufeffa slots=8", ":1: begins with a byte order mark"),
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("x" * (1 << 21), "is larger than"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path, text, words):
    file = tmp_path / "hosts"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(HostfileError, match=words):
        read_hosts(str(file))
    with pytest.raises(HostfileError, match=words):
        launcher(0, hostfile=str(file))


def test_all_wrong_lines_are_reported_at_once(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("a lots=1\nb slots=0\nc slots=1\n-c slots=1\n")
    with pytest.raises(HostfileError) as caught:
        read_hosts(str(file))
    assert [line.rsplit("hosts:")[1][:2] for line in str(caught.value).splitlines()] == ["1:", "2:", "4:"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--include", "-oProxyCommand=id:0"], "is not the name of a host"),
        (["--include=worker-3"], "has no host 'worker-3'; did you mean 'worker-0'"),
        (["--incl", "worker-3"], "has no host 'worker-3'"),
        (["-iworker-3"], "has no host 'worker-3'"),
        (["--exclude", "worker-0:0,x"], "'0,x' are not slots"),
        (["-e", "worker-0:8"], "worker-0 has 8 slots, numbered from 0; there is no slot 8"),
    ],
)
def test_a_wrong_choice_of_hosts_is_refused(options, words):
    with pytest.raises(HostfileError, match=words):
        check_choice(options, {"worker-0": 8, "b": 4})


def test_a_right_choice_of_hosts_passes():
    check_choice(["--include", "worker-0@b:0,3", "--master_addr", "worker-0", "-v"], {"worker-0": 8, "b": 4})


@pytest.mark.parametrize(
    ("processes", "options", "count"), [(0, [], 12), (2, [], 4), (0, ["--include", "b"], 0), (0, ["--num_nodes=1"], 0)]
)
def test_the_number_of_ranks(processes, options, count):
    assert ranks({"a": 8, "b": 4}, processes, options) == count


def test_train_checks_the_layout_for_the_ranks_of_the_hostfile(tmp_path, capfd):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    (tmp_path / "r.yaml").write_text(
        "name: x\nrun: {dir: run}\ndata: {mixture: [{dataset: a}]}\nparallel: {pipeline: 2}\n"
        "deepspeed: {train_batch_size: 4, optimizer: {type: AdamW}, zero_optimization: {stage: 1}}\n"
    )
    assert main(["train", str(tmp_path / "r.yaml"), "--hostfile", str(tmp_path / "hosts")])
    assert "3 processes cannot be divided into 2 pipeline stages" in capfd.readouterr().err
