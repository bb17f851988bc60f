"""EpisodeIndex: memory-mapped arrays, computed ranges, and checks of everything in its files."""

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dataio.making import RICH, SMALL, observed, random_episode, read_window, small_dataset, write
from tiphys.dataio.episode import DataError
from tiphys.dataio.format import arrays, table
from tiphys.dataio.format.document import parse
from tiphys.dataio.format.places import Range
from tiphys.dataio.format.table import Chunks, Record, Shard, TableWriter
from tiphys.dataio.index import EpisodeIndex


def test_the_index_holds_the_episodes_values_and_texts(tmp_path):
    episodes, index = small_dataset(str(tmp_path / "d"))
    assert index.episodes == 30
    assert index.ids[3] == index.id(3) == "s0-3"
    assert list(index.ids)[-1] == "s0-29"
    assert index.steps.tolist() == [e.steps for e in episodes]
    assert index.success.tolist() == [-1 if e.success is None else int(e.success) for e in episodes]
    assert np.allclose(index.total_return, [e.total_return for e in episodes])
    codes, texts = index.text("mission")
    assert [texts[c] for c in codes] == [e.fields["mission"] for e in episodes]
    assert len(texts) == len({e.fields["mission"] for e in episodes})
    codes, agents = index.agents()
    assert [agents[c] for c in codes] == [e.agent for e in episodes]
    codes, texts = index.text("absent")
    assert set(codes.tolist()) == {-1}


def test_an_episode_may_lack_a_text(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [random_episode(SMALL, f"e{i}", 2, rng) for i in range(3)]
    del episodes[1].fields["mission"]
    index = write(str(tmp_path / "d"), episodes, [SMALL])
    codes, _ = index.text("mission")
    assert (codes < 0).tolist() == [False, True, False]
    assert "mission" not in read_window(index, 1, 0, 1, ["mission"])["fields"]


def test_held_out_depends_on_the_id_alone(tmp_path):
    episodes, index = small_dataset(str(tmp_path / "a"), 300)
    again = write(str(tmp_path / "b"), episodes[::-1][:100], [SMALL])
    out = {index.id(i) for i in np.flatnonzero(index.held_out(0.2))}
    assert 30 < len(out) < 90
    assert {again.id(i) for i in np.flatnonzero(again.held_out(0.2))} == {i for i in out if int(i[3:]) >= 200}
    assert not index.held_out(0.0).any()
    assert index.held_out(1.0).all()
    assert table.hash_id("s0-3") == int(index.hash[3]) == 0xE0DC36631801A746  # must never change


def test_row_ranges_equal_the_ranges_of_each_window(tmp_path):
    _, index = small_dataset(str(tmp_path / "d"))
    rng = np.random.default_rng(0)
    e = rng.integers(0, index.episodes, 200)
    start = rng.integers(0, index.rows[e])
    rows = rng.integers(1, 20, 200)
    shard, offset, size = index.row_ranges(e, start, rows)
    for i in range(200):
        (one,) = index.ranges(int(e[i]), int(start[i]), int(rows[i]), ["action"])
        assert one == Range(int(shard[i]), int(offset[i]), int(size[i]), "steps.npy")


def test_ranges_hold_only_the_requested_rows_and_fields(tmp_path):
    rng = np.random.default_rng(0)
    index = write(str(tmp_path / "d"), [random_episode(RICH, "e", 6, rng, observed(RICH))], [RICH])
    assert [r.field for r in index.ranges(0, 1, 3, ["action", "mission", "goal"])] == ["steps.npy"]
    rows, depth = index.ranges(0, 1, 3, ["observation.depth"])
    assert depth.size == 3 * 4 * 4 * 4
    assert rows.size == 3 * index.row_bytes(0)
    with pytest.raises(DataError, match="no field 'nothing'"):
        index.ranges(0, 0, 1, ["nothing"])
    with pytest.raises(DataError, match="no rows from 7"):
        index.ranges(0, 7, 1, [])


def test_an_index_is_decoded_once_then_opened_from_the_cache(tmp_path, monkeypatch):
    url = str(tmp_path / "d")
    small_dataset(url)
    Path(url, "index.parquet").rename(tmp_path / "away")  # a second opening needs only dataset.json
    assert EpisodeIndex.open(url).episodes == 30
    with pytest.raises(FileNotFoundError):
        EpisodeIndex.open(url, str(tmp_path / "another-cache"))
    assert not list((tmp_path / "another-cache" / "index").iterdir())


def test_the_fingerprint_changes_with_the_dataset(tmp_path):
    a = small_dataset(str(tmp_path / "a"))[1].fingerprint
    assert small_dataset(str(tmp_path / "b"))[1].fingerprint == a
    assert small_dataset(str(tmp_path / "c"), 29)[1].fingerprint != a


def _child(index, out):
    out.put((index.id(5), index.steps.tolist(), index.tasks, index.fingerprint))


def test_a_spawned_process_gets_the_folder_of_the_arrays_not_the_arrays(tmp_path):
    import pickle

    _, index = small_dataset(str(tmp_path / "d"), 2000, shard_bytes=1 << 20)
    assert len(pickle.dumps(index)) < 20_000
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    process = context.Process(target=_child, args=(index, out))
    process.start()
    assert out.get() == (index.id(5), index.steps.tolist(), index.tasks, index.fingerprint)
    process.join()


@pytest.mark.parametrize("field", ["action", "observation.image", "speech"])
def test_a_changed_byte_is_reported_with_shard_member_and_range(tmp_path, field):
    rng = np.random.default_rng(0)
    url = str(tmp_path / "d")
    index = write(url, [random_episode(RICH, f"e{i}", 5, rng) for i in range(3)], [RICH])
    place = index.ranges(1, 2, 1, [field])[-1]
    file = Path(url) / index.shard_name(place.shard)
    data = bytearray(file.read_bytes())
    data[place.offset + place.size // 2] ^= 4
    file.write_bytes(data)
    index = EpisodeIndex.open(url)
    with pytest.raises(DataError) as error:
        read_window(index, 1, 0, 5, [field])
    first, last = place.offset, place.offset + place.size - 1
    for part in (index.shard_name(place.shard), place.field.split(".")[0], f"{first}–{last}", "'e1'", "CRC-32C"):
        assert part in str(error.value)
    read_window(index, 0, 0, 5, [field])


def test_a_short_buffer_is_an_error(tmp_path):
    _, index = small_dataset(str(tmp_path / "d"))
    (one,) = index.ranges(0, 0, 1, [])
    data = bytes(index.store.read_ranges(index.shard_name(one.shard), [one.offset], [one.size])[0])
    for wrong in ([data[:-1]], [data + data], []):
        with pytest.raises(DataError):
            index.decode(0, 0, 1, [], wrong)


def rewrite(url, change):
    """Change dataset.json."""
    file = Path(url) / "dataset.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=2),
        lambda d: d.pop("tasks"),
        lambda d: d.update(tasks=[{"name": 3}]),
        lambda d: d["tasks"][0]["fields"][0].update(dtype="object"),
        lambda d: d["tasks"][0]["fields"][0].update(shape=[1 << 60]),
        lambda d: d["digests"].update({"index.parquet": "../../../etc/passwd"}),
        lambda d: d["digests"].update({"index.parquet": "0" * 64}),
        lambda d: d["shards"][0].__setitem__(0, "../../other/shard.tar"),
        lambda d: d["shards"][0].__setitem__(0, "/etc/passwd"),
        lambda d: d["shards"][0].__setitem__(1, 512),
        lambda d: d["shards"].pop(),
        lambda d: d.update(shards=7),
    ],
)
def test_an_invalid_dataset_json_is_refused(tmp_path, change):
    url = str(tmp_path / "d")
    small_dataset(url)
    rewrite(url, change)
    with pytest.raises(DataError, match=r"dataset\.json|index\.parquet|index column|task"):
        EpisodeIndex.open(url, str(tmp_path / "fresh"))


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.long)])
def test_mutated_files_give_clean_errors(tmp_path, count):
    """Random bytes of index.parquet and dataset.json are changed. The files are then refused, or pass all checks."""
    rng = np.random.default_rng(0)
    url = tmp_path / "d"
    write(str(url), [random_episode(RICH, f"e{i}", 3, rng) for i in range(4)], [RICH])
    unchecked = tmp_path / "unchecked.parquet"  # as by a writer that writes no page checksums
    metadata = pq.read_metadata(url / "index.parquet").metadata
    content = pq.read_table(url / "index.parquet")
    with pq.ParquetWriter(unchecked, content.schema) as writer:
        writer.write_table(content)
        writer.add_key_value_metadata({k: metadata[k] for k in (b"tiphys", b"tiphys.crc32c")})
    files = [(url / "index.parquet").read_bytes(), unchecked.read_bytes(), (url / "dataset.json").read_bytes()]
    refused = 0
    for i in range(count):
        data = bytearray(files[i % 3])
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            if i % 3 == 2:
                parse(bytes(data), "dataset.json")
                continue
            mutated = tmp_path / "mutated.parquet"
            mutated.write_bytes(data)
            tasks, shards = table.read_tasks_and_shards(mutated)
            decoded = arrays.decode(mutated, None, [t.name for t in tasks], [s.name for s in shards])
            arrays.check(decoded, tasks, shards, "mutated")
        except DataError:
            refused += 1
    assert refused > count // 3


def test_only_a_local_dataset_may_name_local_shards():
    document = {"version": 1, "tasks": [], "statistics": {}, "digests": {"index.parquet": "0" * 64}}
    raw = json.dumps(document | {"shards": [["file:///etc/passwd", 1, -1]]}).encode()
    parse(raw, "/data/dataset.json")
    with pytest.raises(DataError, match="passwd"):
        parse(raw, "s3://bucket/dataset.json")


def record(i, **changes):
    values = {"id": f"e{i}", "task": "small", "steps": 2, "rows": 2, "total_return": 0.0, "shard": "s.tar"}
    return Record(**{**values, "sample": 0, "sample_bytes": 100, "offset": 0, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 990},
        {"offset": 2**63 - 1},
        {"rows": 5},
        {"steps": -1, "rows": 0},
        {"sample_bytes": -5},
        {"sample": 2**62, "sample_bytes": 2**62},
        {"chunks": {"image": Chunks("png", 1, [900], [200], [0])}},
        {"chunks": {"image": Chunks("png", 1, [-7], [2], [0])}},
    ],
)
def test_an_index_that_points_outside_its_shards_is_refused(tmp_path, changes):
    writer = TableWriter(tmp_path)
    for i in range(3):
        writer.add(record(i, **(changes if i == 1 else {})))
    file = tmp_path / "index.parquet"
    writer.finish(file, [SMALL], [Shard("s.tar", 1000)])
    tasks, shards = table.read_tasks_and_shards(file)
    decoded = arrays.decode(file, None, ["small"], ["s.tar"])
    with pytest.raises(DataError, match=r"(episode|chunk) \d"):
        arrays.check(decoded, tasks, shards, "x")


def test_the_tasks_of_an_index_are_checked_as_those_of_a_dataset(tmp_path):
    field = next(f for f in SMALL.fields if f.role == "observation")
    for fields, reason in (
        ((*SMALL.fields, field), "another field has this name"),
        ((dataclasses.replace(field, dtype="uint("),), r"'uint\(' is not a dtype of NumPy"),
    ):
        file = tmp_path / "index.parquet"
        TableWriter(tmp_path).finish(file, [dataclasses.replace(SMALL, fields=fields)], [])
        with pytest.raises(DataError, match=reason):
            table.read_tasks_and_shards(file)


def test_a_column_whose_name_is_a_path_is_refused(tmp_path):
    file = tmp_path / "index.parquet"
    pq.write_table(pa.table({"text.../../evil": ["x"]}), file)
    with pytest.raises(DataError, match="evil"):
        arrays.decode(file, tmp_path, [], [])


@pytest.mark.parametrize("folder", [False, True])
def test_arrays_on_disk_and_in_memory_equal_the_records(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(table, "PART", 7)
    monkeypatch.setattr(arrays, "PART", 5)
    rng = np.random.default_rng(0)
    writer = TableWriter(tmp_path)
    wanted = []
    for i in range(40):
        chunks = {}
        if i % 3:
            n = int(rng.integers(0, 4))
            chunks["image"] = Chunks("png", 2, list(range(i, i + n)), [1] * n, [7 * i] * n)
        text = {"mission": f"go {i % 4}"} if i % 5 else {}
        value = {"goal": bytes([i, i + 1])} if i % 2 else {}
        wanted.append(
            record(i, chunks=chunks, texts=text, values=value, agent=f"a{i % 2}", success=[None, True][i % 2])
        )
        writer.add(wanted[-1])
    file = tmp_path / "index.parquet"
    writer.finish(file, [SMALL], [Shard("s.tar", 1000)])
    out = tmp_path / "arrays" if folder else None
    if out:
        out.mkdir()
    got = arrays.decode(file, out, ["small"], ["s.tar"])
    first = got["chunks.image.first"]
    for i, r in enumerate(wanted):
        own = slice(*got["chunks.image.first"][i : i + 2])
        chunks = r.chunks.get("image", Chunks("", 1, [], [], []))
        assert got["chunks.image.offset"][own].tolist() == list(chunks.offset)
        assert got["chunks.image.crc"][own].tolist() == list(chunks.crc)
        assert got["value.goal.bytes"][slice(*got["value.goal.first"][i : i + 2])].tobytes() == r.values.get(
            "goal", b""
        )
        code = got["text.mission"][i]
        first = got["text.mission.first"]
        text = got["text.mission.bytes"][first[code] : first[code + 1]].tobytes().decode() if code >= 0 else None
        assert text == r.texts.get("mission")
        assert got["success"][i] == (-1 if r.success is None else 1)
    assert len(got["agent.first"]) == 3
    if out:
        shutil.rmtree(out)  # mapped arrays stay usable
        assert got["steps"].tolist() == [2] * 40


def test_a_dataset_without_episodes_can_be_opened(tmp_path):
    index = write(str(tmp_path / "d"), [], [SMALL])
    assert index.episodes == 0
    assert not len(index.held_out(0.5))
    assert index.row_ranges(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))[0].shape == (0,)


@pytest.mark.long
def test_ten_million_episodes_open_in_milliseconds(tmp_path):
    """Ten million rows are written column by column, decoded without a Python object for each, and opened from the cache."""
    import time

    n = 10_000_000
    codes = np.arange(n)
    empty = table._table([])
    columns = {
        "id": pa.array(codes).cast(pa.string()),
        "task": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["small"]).cast(pa.string()),
        "agent": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["x"]).cast(pa.string()),
        "shard": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["s.tar"]).cast(pa.string()),
        "short": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), [""]).cast(pa.string()),
        "hash": pa.array(codes.astype(np.uint64)),
        "return": pa.array(np.zeros(n)),
        "success": pa.nulls(n, pa.bool_()),
    }
    for name in empty.schema.names:
        if name not in columns:
            kind = empty.schema.field(name).type.to_pandas_dtype()
            columns[name] = pa.array(np.ones(n, kind))
    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({name: columns[name] for name in empty.schema.names}), file)
    table.combine([table.Part(file)], tmp_path / "index.parquet", [SMALL], [Shard("s.tar", 1 << 40)])
    out = tmp_path / "arrays"
    out.mkdir()
    arrays.decode(tmp_path / "index.parquet", out, ["small"], ["s.tar"])
    begin = time.perf_counter()
    got = arrays.load(out)
    assert time.perf_counter() - begin < 1.0
    assert got["id.first"][-1] == len(got["id.bytes"])
    assert got["steps"].shape == (n,)


@pytest.mark.parametrize(
    "where", ["/data/dataset.json", "https://example.org/dataset.json", "s3://bucket/dataset.json"]
)
def test_a_dataset_may_name_other_hosts_only_if_the_user_allows_it(where, monkeypatch):
    document = {"version": 1, "tasks": [], "statistics": {}, "digests": {"index.parquet": "0" * 64}}
    raw = json.dumps(document | {"shards": [["http://169.254.169.254/latest/x.tar", 1, -1]]}).encode()
    with pytest.raises(DataError, match=r"another host.*TIPHYS_SHARD_HOSTS=169\.254\.169\.254"):
        parse(raw, where)
    monkeypatch.setenv("TIPHYS_SHARD_HOSTS", "a.org,169.254.169.254")
    parse(raw, where)
    parse(json.dumps(document | {"shards": [["https://example.org/x.tar", 1, -1]]}).encode(), "https://example.org/d")


@pytest.mark.parametrize(
    ("shards", "tasks"),
    [
        ([["s.tar", float("inf"), -1]], []),
        ([["s.tar", 1]], 5),
        ([["s.tar", 1, -1]], [{"name": "a", "fields": [{"name": "x", "shape": [float("inf")]}]}]),
        ([["s.tar", 1, -1]], [{"name": "a", "fields": [], "max_steps": float("inf")}]),
    ],
)
def test_infinity_is_no_size(shards, tasks):
    document = {"version": 1, "statistics": {}, "digests": {"index.parquet": "0" * 64}}
    with pytest.raises(DataError):
        parse(json.dumps(document | {"shards": shards, "tasks": tasks}).encode(), "x")


def written(tmp_path, change, **changes):
    """An index file whose table was changed."""
    writer = TableWriter(tmp_path)
    for i in range(3):
        writer.add(record(i, **changes))
    file = tmp_path / "index.parquet"
    writer.finish(file, [SMALL], [Shard("s.tar", 1000)])
    metadata, content = pq.read_metadata(file).metadata, change(pq.read_table(file))
    with pq.ParquetWriter(file, content.schema) as out:
        out.write_table(content)
        out.add_key_value_metadata({k: metadata[k] for k in (b"tiphys", b"tiphys.crc32c")})
    return file


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("hash", None),
        ("rows", pa.array([2, None, 2], pa.int32())),
        ("steps", pa.array([2.5, 2.0, 2.0])),
        ("id", pa.array([1, 2, 3])),
    ],
)
def test_columns_that_are_missing_or_have_other_types_are_refused(tmp_path, name, values):
    def change(content):
        place = content.schema.names.index(name)
        return content.remove_column(place) if values is None else content.set_column(place, name, values)

    with pytest.raises(DataError, match=f"index column '{name}'"):
        arrays.decode(written(tmp_path, change), None, ["small"], ["s.tar"])


@pytest.mark.parametrize("chunks", [Chunks("png", 1, [500, 0], [10, 10], [0, 0]), Chunks("png", 1, [0], [10], [0])])
def test_chunks_in_another_order_or_number_are_refused(tmp_path, chunks):
    file = written(tmp_path, lambda content: content, chunks={"image": chunks})
    tasks, shards = table.read_tasks_and_shards(file)
    with pytest.raises(DataError, match="chunk"):
        arrays.check(arrays.decode(file, None, ["small"], ["s.tar"]), tasks, shards, "x")
