"""A LeRobot dataset whose videos stay where they are: the rows as a conversion reads them, and which video has their pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.convert.converter import Piece
from tiphys.dataio.convert.lerobot import LeRobot, Record, column
from tiphys.dataio.convert.lerobot_cameras import Camera, is_depth
from tiphys.dataio.episode import DataError, Episode

VIDEOS = "tiphys.videos"  # of an episode's info: camera's field -> (file, seconds into it at which the episode begins)
_CONVERT = "`tiphys convert` reads this dataset and stores its pictures anew"


class LeRobotInPlace(LeRobot):
    """Yields episodes as `LeRobot` does, but a camera's field holds the times of its rows: float32 [T], `timestamp`.

    `info` says by `VIDEOS` which video each camera has.
    """

    @cached_property
    def _cameras(self) -> dict[str, Camera]:
        """Raises DataError, with the way out, for pictures that cannot stay where they are."""
        for key, feature in self._features.items():
            where = f"{self.source.where('meta/info.json')}, feature {key!r}"
            if feature.get("dtype") == "image":
                raise DataError(f"{where}: its pictures lie inside Parquet files, not in videos; {_CONVERT}")
            if feature.get("dtype") == "video" and is_depth(feature):
                raise DataError(f"{where}: is a depth video, whose codes are not colours; {_CONVERT}")
        cameras = super()._cameras
        for key, camera in cameras.items():
            if camera.field.dtype != "uint8":
                raise DataError(
                    f"{self.source.url}, feature {key!r}: its video has more than 8 bits per colour; {_CONVERT}"
                )
        return cameras

    def versions(self, piece: Piece) -> list[str]:
        return []  # nothing is continued later, and each would be a request

    def _needed(self, record: Record, wanted: Collection[str]) -> list[str]:
        return [record.data]  # whoever opens the videos finds out whether they are there

    def _values(
        self, key: str, feature: Mapping[str, Any], record: Record, table: Any, files: Any, where: str
    ) -> np.ndarray:
        if key not in record.videos:
            return super()._values(key, feature, record, table, files, where)
        return np.asarray(column(table, "timestamp", where, ()), np.float32)

    def _read(self, record: Record, files: Any) -> Episode:
        for path, _ in record.videos.values():  # our parent opens it: it must not lead elsewhere
            self.source.check(path)
            self.source.local_path(path)
        videos = {self._names[k]: list(place) for k, place in record.videos.items()}
        episode = super()._read(record, files)
        return replace(episode, info={**episode.info, VIDEOS: videos})
