"""One command trains in a run's folder; it loses the folder only if it is dead, and then it can save nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tiphys.launch import lease
from tiphys.launch.lease import FolderInUse, Lease, LeaseLost, Record, Watch

ELSEWHERE = {"machine": "another boot"}


def rewrite(folder: Path, **changes: object) -> Record:
    record = lease.read(folder / "lease.json")
    assert record is not None
    record = replace(record, **changes)
    (folder / "lease.json").write_text(json.dumps(asdict(record)))
    return record


def test_a_second_command_is_told_who_trains_there(tmp_path: Path) -> None:
    first = Lease(tmp_path)
    with pytest.raises(FolderInUse, match=rf"is trained by host .*, process {os.getpid()}, since 20"):
        Lease(tmp_path)
    first.release()
    Lease(tmp_path).release()
    assert not (tmp_path / "lease.json").exists()


@pytest.mark.parametrize("text", ["", "{", '{"token": 1}', "[]"])
def test_a_damaged_file_is_nobodys_lease(text: str, tmp_path: Path) -> None:
    (tmp_path / "lease.json").write_text(text)
    Lease(tmp_path).release()


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_at_once(tmp_path: Path) -> None:
    Lease(tmp_path)
    rewrite(tmp_path, started=1)  # its process number belongs to another process by now
    Lease(tmp_path, wait=lambda seconds: pytest.fail("nothing has to be waited for")).release()


def test_an_owner_on_another_machine_is_dead_if_its_counter_stands_still(tmp_path: Path) -> None:
    Lease(tmp_path)
    found = rewrite(tmp_path, **ELSEWHERE)
    waits: list[float] = []
    with pytest.raises(FolderInUse):
        Lease(tmp_path, wait=lambda seconds: rewrite(tmp_path, counter=found.counter + 1))
    Lease(tmp_path, wait=waits.append).release()
    assert sum(waits) > lease.PERIOD * lease.MISSES


def test_who_lost_the_lease_cannot_renew_or_save_and_takes_nothing_away(tmp_path: Path) -> None:
    slept = Lease(tmp_path)
    rewrite(tmp_path, started=1)
    owner = Lease(tmp_path)
    with pytest.raises(LeaseLost, match="taken over by"):
        slept.renew(at_once=True)
    with pytest.raises(LeaseLost):
        lease.check(tmp_path, slept.token, 0)
    slept.release()
    lease.check(tmp_path, owner.token, 0)


def watching(folder: Path, token: str) -> tuple[Watch, list[int]]:
    asked: list[int] = []
    watch = Watch(folder, token, 0, lost=lambda why: None, stop=asked.append)
    return watch, asked


def test_ranks_end_after_three_missed_renewals_and_not_while_the_owner_lives(tmp_path: Path) -> None:
    owner = Lease(tmp_path)
    watch, _ = watching(tmp_path, owner.token)
    assert [watch.look() for _ in range(9)] == [""] * 9  # it lives, although nothing is renewed
    rewrite(tmp_path, **ELSEWHERE)
    assert [bool(watch.look()) for _ in range(4)] == [False, False, True, True]
    rewrite(tmp_path, counter=7)
    assert watch.look() == ""
    rewrite(tmp_path, token="other")
    assert "taken over by host" in watch.look()
    watch.close()


def test_a_folder_that_cannot_be_read_is_no_missed_renewal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, _ = watching(tmp_path, Lease(tmp_path).token)

    def stale(path: Path) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(lease, "read", stale)
    assert [watch.look() for _ in range(9)] == [""] * 9
    watch.close()


def test_a_stop_travels_with_the_lease(tmp_path: Path) -> None:
    owner = Lease(tmp_path)
    watch, asked = watching(tmp_path, owner.token)
    watch.look()
    for number in (signal.SIGUSR2, signal.SIGTERM):  # after stacks, a stop must still be heard
        owner.stop(number)
        watch.look()
        watch.look()
    watch.close()
    assert asked == [signal.SIGUSR2, signal.SIGTERM]


def test_ranks_of_a_launch_that_was_replaced_end_and_save_nothing(tmp_path: Path) -> None:
    owner = Lease(tmp_path)
    watch, _ = watching(tmp_path, owner.token)
    assert watch.look() == ""
    owner.begin(2)
    assert watch.look() == "launch 0 was replaced by launch 2"
    with pytest.raises(LeaseLost, match="launch 1 was replaced by launch 2"):
        lease.check(tmp_path, owner.token, 1)
    lease.check(tmp_path, owner.token, 2)
    watch.close()
