"""A server of a folder over HTTP, with ranges, ETags, conditions, and delays that a test sets.

It runs in a thread, or in its own process: `python tests/folder_server.py FOLDER [ADDRESS]` prints its URL.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote


class FolderServer:
    """Serves the files of a folder by GET and HEAD.

    keep      whether connections stay open between requests
    delay     function from an object's path to the seconds before the answer
    requests  requested paths, in order
    """

    def __init__(self, folder: str | Path, address: str = "127.0.0.1", *, keep: bool = True) -> None:
        self.folder, self.address, self.keep = Path(folder), address, keep
        self.delay: Callable[[str], float] = lambda path: 0.0
        self.requests: list[str] = []
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> FolderServer:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self.start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, self.address, 0)
        return f"http://{self.address}:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
                self.requests.append(path)
                if (pause := self.delay(path)) > 0:
                    await asyncio.sleep(pause)
                head, body = self._answer(unquote(path), headers)
                writer.write(head + (b"" if method == "HEAD" else body))
                await writer.drain()
                if not self.keep:
                    break
        writer.close()

    def _answer(self, path: str, headers: dict[str, str]) -> tuple[bytes, bytes]:
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b""
        stat = file.stat()
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
        if headers.get("if-match", etag) != etag:
            return b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n", b""
        first, last, status, more = 0, stat.st_size - 1, "200 OK", ""
        if "range" in headers:
            a, _, z = headers["range"].removeprefix("bytes=").partition("-")
            first, last = int(a), min(int(z) if z else last, last)
            if first > last:
                return b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n", b""
            status, more = "206 Partial Content", f"Content-Range: bytes {first}-{last}/{stat.st_size}\r\n"
        with open(file, "rb") as opened:
            opened.seek(first)
            body = opened.read(last - first + 1)
        more += "" if self.keep else "Connection: close\r\n"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nETag: {etag}\r\nAccept-Ranges: bytes\r\n{more}"
            "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n"
        )
        return head.encode(), body


async def _main(folder: str, address: str) -> None:
    print(await FolderServer(folder, address).start(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"))
