"""A conversion keeps all data; its bytes depend neither on the number of processes nor on kills and restarts."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dataio.convert.convert_sources import lerobot_v2, npz
from tests.dataio.convert.test_convert_formats import assert_same
from tiphys.dataio.convert import convert
from tiphys.dataio.dataset import inspect, read_episode
from tiphys.dataio.episode import DataError, Episode
from tiphys.dataio.index import EpisodeIndex

# Runs convert() in a process that can be killed; prints a line when it begins.
CONVERT = """
import sys
import tiphys.dataio.convert

if __name__ == "__main__":
    print("go", flush=True)
    tiphys.dataio.convert.convert(sys.argv[1], sys.argv[2], shard_bytes=20_000)
"""


def digests(folder: Path) -> dict[str, str]:
    """Digests of all files of a dataset, except `pieces/`, which belongs to the conversion."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.relative_to(folder).parts[0] != "pieces"
    }


def episodes_of(folder: Path) -> dict[str, Episode]:
    index = EpisodeIndex.open(str(folder))
    return {index.id(e): read_episode(index, e) for e in range(index.episodes)}


@pytest.mark.parametrize("name", ["lerobot-v2", "minari-hdf5", "rlds", "webdataset", "dqn-replay"])
def test_shards_keep_all_data(made: Any, name: str, tmp_path: Path) -> None:
    source, format, expected = made(name)
    report = convert(str(source), str(tmp_path / "out"), processes=1)
    assert (report.format, report.episodes, report.bad) == (format, len(expected), ())
    found = episodes_of(tmp_path / "out")
    assert sorted(found) == sorted(expected)
    for key, (steps, fields) in expected.items():
        assert found[key].steps == steps
        for field, wanted in fields.items():
            assert_same(found[key].fields[field], wanted, f"{key} {field}")
    summary = inspect(str(tmp_path / "out"))
    assert summary["episodes"] == len(expected)
    assert summary["steps"] == sum(s for s, _ in expected.values())


def test_webdataset_library_reads_the_result(made: Any, tmp_path: Path) -> None:
    import webdataset

    source, _, expected = made("npz")
    convert(str(source), str(tmp_path / "out"), processes=1)
    shards = [str(p) for p in sorted((tmp_path / "out/shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    found = {s["json"]["id"]: s for s in samples}
    assert sorted(found) == sorted(expected)
    for key, (steps, fields) in expected.items():
        np.testing.assert_array_equal(found[key]["steps.npy"]["action"][:steps], fields["action"])


def test_bytes_do_not_depend_on_processes_and_a_second_run_changes_nothing(made: Any, tmp_path: Path) -> None:
    source = made("dqn-replay")[0]
    convert(str(source), str(tmp_path / "one"), processes=1)
    seen: list[tuple[int, int]] = []
    report = convert(str(source), str(tmp_path / "two"), processes=2, progress=lambda a, b: seen.append((a, b)))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert seen == [(0, 2), (1, 2), (2, 2)]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "two/shards").iterdir()}
    again = convert(str(source), str(tmp_path / "two"), processes=2)
    assert again == report
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "two/shards").iterdir()}


def test_a_conversion_killed_and_run_again_gives_the_same_bytes(made: Any, tmp_path: Path) -> None:
    source = made("dqn-replay")[0]
    whole = tmp_path / "whole"
    convert(str(source), str(whole), processes=1, shard_bytes=20_000)
    start = time.monotonic()
    convert(str(source), str(tmp_path / "timed"), processes=1, shard_bytes=20_000)
    duration = time.monotonic() - start
    random_numbers = random.Random(1)
    killed = tmp_path / "killed"
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(source), str(killed)], stdout=subprocess.PIPE, start_new_session=True
        ) as child:
            assert child.stdout is not None
            child.stdout.read(3)
            time.sleep(random_numbers.uniform(0, duration))
            os.killpg(child.pid, signal.SIGKILL)
    convert(str(source), str(killed), processes=1, shard_bytes=20_000)
    assert digests(killed) == digests(whole)


@pytest.mark.long
def test_conversions_killed_many_times_give_the_same_bytes(tmp_path: Path) -> None:
    from tests.dataio.convert.convert_sources import dqn_replay

    source = tmp_path / "source"
    dqn_replay(source)
    convert(str(source), str(tmp_path / "whole"), processes=2, shard_bytes=20_000)
    random_numbers = random.Random(2)
    for number in range(15):
        killed = tmp_path / f"killed-{number}"
        for _ in range(random_numbers.randrange(1, 4)):
            with subprocess.Popen(
                [sys.executable, "-c", CONVERT, str(source), str(killed)],
                stdout=subprocess.PIPE,
                start_new_session=True,
            ) as child:
                assert child.stdout is not None
                child.stdout.read(3)
                time.sleep(random_numbers.uniform(0, 6))
                os.killpg(child.pid, signal.SIGKILL)
        convert(str(source), str(killed), processes=1, shard_bytes=20_000)
        assert digests(killed) == digests(tmp_path / "whole")


def test_no_process_is_left_if_only_the_main_process_is_killed(tmp_path: Path) -> None:
    """After kill -9 of the main process, its workers and their readers end by themselves."""
    from tests.dataio.convert.convert_sources import dqn_replay

    dqn_replay(tmp_path / "source")
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "source"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        child.stdout.read(3)
        seen, deadline = 0, time.monotonic() + 30
        while seen < 4 and child.poll() is None and time.monotonic() < deadline:
            seen = max(seen, len(_processes_of_session(child.pid)))
            time.sleep(0.02)
        assert seen >= 4, "the main process, two workers and a reader were expected"
        os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while _processes_of_session(child.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes_of_session(child.pid) == []


def _processes_of_session(leader: int) -> list[int]:
    out = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except (OSError, IndexError):
                continue
            if fields[0] != "Z" and int(fields[3]) == leader:
                out.append(int(entry.name))
    return out


def test_malformed_episodes_raise_or_are_skipped(tmp_path: Path) -> None:
    """Without skip_bad, the first one raises an error that names its file, and no dataset is left behind.

    With skip_bad, all other episodes are converted.
    """
    expected = lerobot_v2(tmp_path / "robot")
    missing = tmp_path / "robot/videos/chunk-000/observation.images.top/episode_000001.mp4"
    missing.unlink()
    with pytest.raises(DataError, match=r"episode_000001\.mp4: is missing.*--skip-bad"):
        convert(str(tmp_path / "robot"), str(tmp_path / "out"), processes=1)
    assert not (tmp_path / "out/dataset.json").exists()
    report = convert(str(tmp_path / "robot"), str(tmp_path / "out"), processes=1, skip_bad=True)
    assert report.episodes == 2
    assert [b.where.rpartition(", ")[2] for b in report.bad] == ["episode 1"]
    assert "1 malformed episode was left out" in str(report)
    assert sorted(episodes_of(tmp_path / "out")) == [k for k in sorted(expected) if not k.endswith("1")]
    assert json.loads((tmp_path / "out/conversion.json").read_text())["bad"][0]["reason"].endswith("lists episode 1")


def test_if_all_episodes_are_malformed_no_dataset_is_written(tmp_path: Path) -> None:
    lerobot_v2(tmp_path / "robot")
    for file in (tmp_path / "robot/data/chunk-000").iterdir():
        file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="no episode could be converted"):
        convert(str(tmp_path / "robot"), str(tmp_path / "out"), processes=1, skip_bad=True)
    assert not (tmp_path / "out/dataset.json").exists()


def test_a_folder_with_another_conversion_is_refused(made: Any, tmp_path: Path) -> None:
    npz(tmp_path / "source")
    convert(str(tmp_path / "source"), str(tmp_path / "out"), processes=1)
    with pytest.raises(FileExistsError, match="differs in mapping, tasks"):
        convert(str(tmp_path / "source"), str(tmp_path / "out"), mapping={"task": "other"}, processes=1)
    (tmp_path / "source/001.npz").touch()
    os.utime(tmp_path / "source/001.npz", (1, 1))
    with pytest.raises(FileExistsError, match="the source's files"):
        convert(str(tmp_path / "source"), str(tmp_path / "out"), processes=1)


def test_mapping_file(made: Any, tmp_path: Path) -> None:
    source, _, expected = made("lerobot-v2")
    file = tmp_path / "map.yaml"
    file.write_text(
        """
task: bottle
environment: robots/bottle
max_steps: 100
fields:
  observation.images.*: {encoding: jpeg, quality: 90}
  observation.state: {name: observation.joints, low: -1, high: [1e0, 2, 3]}
  terminated: drop
text:
  mission: always the same
"""
    )
    convert(str(source), str(tmp_path / "out"), mapping=str(file), processes=1)
    index = EpisodeIndex.open(str(tmp_path / "out"))
    (task,) = index.tasks
    assert (task.name, task.environment, task.max_steps) == ("bottle", "robots/bottle", 100)
    assert "terminated" not in {f.name for f in task.fields}
    assert (task.field("observation.joints").low, task.field("observation.joints").high) == ((-1.0,), (1.0, 2.0, 3.0))
    for key, episode in episodes_of(tmp_path / "out").items():
        fields = expected[key][1]
        assert episode.fields["mission"] == "always the same"
        assert_same(episode.fields["observation.joints"], fields["observation.state"], key)
        error = episode.fields["observation.images.top"].astype(int) - fields["observation.images.top"]
        assert 0 < np.abs(error).mean() < 10  # JPEG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fields: {nothing: drop}", "no field matches 'nothing'; there are action"),
        ("feilds: {}\nfields: {a: {rol: x}}", "unknown key 'feilds'.*unknown key 'rol'"),
        ("task: a\ntask: b", r"map\.yaml:2: task: this key appears twice, first on line 1"),
        ("fields: {action: {role: actoin}}", "role 'actoin' is none of"),
        ("fields: {action: {name: reward}}", "two fields.*reward"),
        ("options: {stack: 4}", "options: stack unknown to format 'npz'"),
        ("fields: {action: {encoding: h265}}", "encoding 'h265' is none of"),
        ("[1, 2]", "keys and values are expected"),
        ("a: [", "not YAML"),
        ("task: Nan", 'task: Nan can be read as a number.*"Nan"'),
        ("text: {instruction: on}", 'text.instruction: must be a text; write it in quotes: "on"'),
        ("task: 2024-01-01", 'can be read as a date; write it in quotes, "2024-01-01"'),
        ("fields: {action: {name: 7}}", 'fields.action.name: must be a text; write it in quotes: "7"'),
        ("task: &a x\ntext: {b: *a}", "map.yaml:1: &a is an anchor"),
    ],
)
def test_errors_in_a_mapping_file(made: Any, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        convert(str(made("npz")[0]), str(tmp_path / "out"), mapping=str(tmp_path / "map.yaml"), processes=1)
    assert not (tmp_path / "out").exists()


def test_a_user_defined_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from a package with an entry point, and runs in a reader process like the built-in converters."""
    package = tmp_path / "site"
    (package / "mine-1.0.dist-info").mkdir(parents=True)
    (package / "mine-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "mine-1.0.dist-info/entry_points.txt").write_text("[tiphys.converters]\nmine = mine:Mine\n")
    (package / "mine.py").write_text(
        """
import numpy as np
from tiphys.dataio.convert.converter import Converter, Piece
from tiphys.dataio.episode import Episode

class Mine(Converter):
    name = "mine"
    @classmethod
    def recognise(cls, source):
        return 1.0 if any(p.endswith(".mine") for p in source.files) else 0.0
    def pieces(self):
        return [Piece(f"{i:03d}", {"files": [p]}) for i, p in enumerate(self.source.files)]
    def episodes(self, piece, start=0):
        values = np.array([float(x) for x in self.source.read(piece.data["files"][0]).split()])
        yield Episode("e" + piece.name, "mine", {"observation": values[:, None], "action": values[:, None]}, len(values))
"""
    )
    monkeypatch.syspath_prepend(str(package))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.mine").write_text("1 2 3")
    (tmp_path / "data/b.mine").write_text("4 5")
    report = convert(str(tmp_path / "data"), str(tmp_path / "out"), processes=1)
    assert (report.format, report.episodes, report.steps) == ("mine", 2, 5)
    (tmp_path / "data/c.mine").write_text("not numbers")
    with pytest.raises(DataError, match="could not convert string to float"):
        convert(str(tmp_path / "data"), str(tmp_path / "more"), processes=1)


def test_ray_is_started_without_its_dashboard(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**options: Any) -> None:
        raise ConnectionError(options["include_dashboard"])

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="False"):
        convert(str(made("npz")[0]), str(tmp_path / "there"), on="ray")


@pytest.mark.long
def test_ray_gives_the_same_bytes(made: Any, tmp_path: Path) -> None:
    import ray

    source = made("dqn-replay")[0]
    convert(str(source), str(tmp_path / "here"), processes=1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        convert(str(source), str(tmp_path / "there"), on="ray")
        lerobot_v2(tmp_path / "robot")
        (tmp_path / "robot/data/chunk-000/episode_000001.parquet").unlink()
        with pytest.raises(DataError, match="episode_000001"):
            convert(str(tmp_path / "robot"), str(tmp_path / "broken"), on="ray")
    finally:
        ray.shutdown()
    assert digests(tmp_path / "here") == digests(tmp_path / "there")
