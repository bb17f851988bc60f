"""A store for benchmarks: nginx serves a folder as an S3 bucket, with a latency of the first byte and a rate per connection.

The server can only be read from; a dataset is written into the folder directly. It counts requests and body bytes itself. It
needs the Debian packages nginx-light and libnginx-mod-http-lua.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType

_MODULES = Path("/usr/lib/nginx/modules")
_CONFIGURATION = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
{user}
worker_processes 1;
daemon off;
pid {run}/nginx.pid;
error_log {run}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    access_log off; sendfile on; tcp_nodelay on; keepalive_timeout 300; keepalive_requests 1000000;
    client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/fastcgi;
    uwsgi_temp_path {run}/uwsgi; scgi_temp_path {run}/scgi;
    open_file_cache max=10000 inactive=60s;
    default_type application/octet-stream;
    lua_shared_dict counts 1m;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        root {root};
        location = /-counts {{
            content_by_lua_block {{
                local c = ngx.shared.counts
                ngx.say((c:get("requests") or 0) .. " " .. (c:get("bytes") or 0))
            }}
        }}
        location / {{
            limit_rate {rate};
            access_by_lua_block {{ if {latency} > 0 then ngx.sleep({latency}) end }}
            log_by_lua_block {{
                local c = ngx.shared.counts
                c:incr("requests", 1, 0)
                c:incr("bytes", tonumber(ngx.var.body_bytes_sent) or 0, 0)
            }}
        }}
    }}
}}
"""


class StoreServer:
    """A context manager. `endpoint` is the value for AWS_ENDPOINT_URL.

    root     folder; the folders in it are the buckets
    run      folder for the server's own files
    latency  seconds before the first byte of each answer
    rate     most bytes a second for each connection, as nginx writes them (`80m`); `0`: no limit
    """

    def __init__(self, root: Path, run: Path, latency: float = 0.015, rate: str = "80m"):
        self.root, self.run, self.latency, self.rate = root, run, latency, rate

    def __enter__(self) -> StoreServer:
        if shutil.which("nginx") is None or not (_MODULES / "ngx_http_lua_module.so").exists():
            raise RuntimeError("nginx with Lua is not installed: apt-get install nginx-light libnginx-mod-http-lua")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.run.mkdir(parents=True, exist_ok=True)
        text = _CONFIGURATION.format(
            modules=_MODULES, run=self.run.absolute(), root=self.root.absolute(), port=port, rate=self.rate,
            latency=self.latency, user="user root;" if os.geteuid() == 0 else "",
        )  # fmt: skip
        (self.run / "nginx.conf").write_text(text)
        self._process = subprocess.Popen(["nginx", "-c", str((self.run / "nginx.conf").absolute())])
        self.endpoint = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                self.counts()
                return self
            except OSError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
        self.__exit__(None, None, None)
        raise RuntimeError(f"nginx did not start; see {self.run}/error.log")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def counts(self) -> tuple[int, int]:
        """(requests, body bytes) since the start."""
        with urllib.request.urlopen(f"{self.endpoint}/-counts", timeout=2) as answer:
            requests, size = answer.read().split()
        return int(requests), int(float(size))
