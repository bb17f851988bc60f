"""Size, write time, and random windows per second of every image encoding, on the frames of a real video.

    python benchmarks/encodings.py VIDEO.mp4 [--frames 240] [--size 128] [--window 8] [--json FILE]

All encodings are measured side by side in one run, on one core and from a local folder, so the results are the cost of the
codec, not of a network. Random windows are read as the loader reads them (ranges, bytes, CRCs, decoding). Each rate is the median
of five.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.format.encodings import Encoding
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter

CASES = {
    "raw": Encoding("raw"),
    "png": Encoding("png"),
    "webp (default)": Encoding("webp"),
    "webp, 4 frames": Encoding("webp", 4),
    "jpeg 90": Encoding("jpeg", 1, 90),
    "webp-lossy 85": Encoding("webp-lossy", 1, 85),
    "h264, 8 frames": Encoding("h264", 8),
    "h264, 16 frames": Encoding("h264", 16),
    "av1, 16 frames": Encoding("av1", 16),
}


def frames_of(video: str, count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: the first frames of a video, scaled."""
    import av

    out = []
    with av.open(video) as container:
        for frame in container.decode(video=0):
            out.append(frame.reformat(size, size, "rgb24").to_ndarray())
            if len(out) == count:
                break
    return np.stack(out)


def measure(frames: np.ndarray, encoding: Encoding, window: int, folder: Path) -> dict[str, float]:
    task = TaskSpec("video", (FieldSpec("image", "observation", "image", "uint8", frames.shape[1:]),))
    half = len(frames) // 2
    begin = time.process_time()
    with ShardWriter(str(folder), [task], encodings={"image": encoding}) as writer:
        for i, part in enumerate((frames[:half], frames[half:])):
            writer.write(Episode(f"e{i}", "video", {"image": part}, len(part)))
    written = time.process_time() - begin
    index = EpisodeIndex.open(str(folder))
    error = np.abs(_window(index, 0, 0, half)["fields"]["image"].astype(int) - frames[:half]).mean()
    rates = []
    rng = np.random.default_rng(0)
    for _ in range(5):
        draws = [(int(rng.integers(2)), int(rng.integers(half - window))) for _ in range(40)]
        begin = time.process_time()
        for episode, start in draws:
            _window(index, episode, start, window)
        rates.append(len(draws) / (time.process_time() - begin))
    size = sum(s.size for s in index.shards)
    return {
        "bytes_a_frame": size / len(frames),
        "share_of_raw": size / frames.nbytes,
        "write_ms_a_frame": 1e3 * written / len(frames),
        "windows_a_second": statistics.median(rates),
        "mean_error": float(error),
    }


def _window(index: EpisodeIndex, episode: int, start: int, rows: int) -> dict:
    ranges = index.ranges(episode, start, rows, ["image"])
    read = index.store.read_ranges
    buffers = [read(index.shard_name(r.shard), [r.offset], [r.size])[0] for r in ranges]
    return index.decode(episode, start, rows, ["image"], buffers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video")
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    frames = frames_of(arguments.video, arguments.frames, arguments.size)
    results = {}
    print(f"{len(frames)} frames of {arguments.size}×{arguments.size}, windows of {arguments.window} frames, one core")
    print(
        "| encoding | bytes a frame | share of raw | write, ms a frame | windows/s | mean error |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIPHYS_CACHE"] = str(Path(folder, "cache"))
        measure(frames[:20], Encoding("raw"), 4, Path(folder, "warm"))
        for i, (name, encoding) in enumerate(CASES.items()):
            r = results[name] = measure(frames, encoding, arguments.window, Path(folder, str(i)))
            print(
                f"| {name} | {r['bytes_a_frame']:.0f} | {r['share_of_raw']:.3f} | {r['write_ms_a_frame']:.2f} "
                f"| {r['windows_a_second']:.0f} | {r['mean_error']:.2f} |",
                flush=True,
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
