"""What `tiphys serve` adds to an action, and how its rate grows with clients, side by side in one run.

    python -m benchmarks.serve [--steps 200] [--clients 1,8,32] [--json FILE]
    python -m benchmarks.serve --follow SECONDS        # only how long replies take while newer weights are taken over

The server is a process of its own. The policy has 4 layers of width 256, every other one a mixture of 4 experts, with random
weights; a step has 39 numbers of state and 4 actions, as in Meta-World. Clients are threads of a further process, so that they do
not share a lock with the server. Each client asks again as soon as it is answered, as a simulator that costs nothing would. Rates
are clients ÷ median time of an action. `added` is the time from a request to its answer, as the client sees it, less that of the
forward passes, as the server says it (median).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import FieldSpec, TaskSpec
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.serving import wire

STATE, ACTIONS = 39, 4
_EVERY = 12.0  # seconds between two versions of the weights that a server follows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--json", default="")
    parser.add_argument("--follow", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()
    if args.follow:
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(swapped(Path(place), args.follow)))
        return
    counts = [int(n) for n in args.clients.split(",")]
    with tempfile.TemporaryDirectory() as place:
        folder = policy(Path(place))
        command = [sys.executable, "-m", "tiphys", "serve", str(folder), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = next(word for word in server.stdout.readline().split() if word.startswith("ws://"))
            rows = [measured(url, folder, count, args.steps) for count in counts]
        finally:
            server.terminate()
            server.wait()
    print(
        "| clients | actions/s | × one client | ms an action (median / 99 %) | forward pass, ms | added, ms |", end=""
    )
    print(" Policy.act alone, actions/s |\n" + "|---" * 7 + "|")
    for row in rows:
        times, rate = f"{row['ms']:.2f} / {row['ms99']:.2f}", row["rate"]
        print(f"| {row['clients']} | {rate:.0f} | {rate / rows[0]['rate']:.1f} | {times} |", end="")
        print(f" {row['infer_ms']:.2f} | {row['added_ms']:.2f} | {row['policy_rate']:.0f} |")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))


def policy(folder: Path, seed: int = 0) -> Path:
    """A policy with random weights."""
    import tests.pretrain.token_fixtures as fixtures
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.recipes.sections.model import Experts, Model

    fields = (
        FieldSpec("observation", "observation", "continuous", "float32", (STATE,)),
        FieldSpec("action", "action", "continuous", "float32", (ACTIONS,), low=(-1.0,), high=(1.0,)),
    )
    objectives = fixtures.make([TaskSpec("reach", fields)], "bc", context=160, scheme="compact")
    sizes = Model(layers=4, hidden=256, heads=4, kv_heads=2, moe=Experts(experts=4, experts_per_token=2, every=2))
    DecisionModel(DecisionConfig.from_recipe(sizes, objectives.vocabulary), seed=seed).save_pretrained(folder)
    (folder / "processor.json").write_text(json.dumps(objectives.processor()))
    return folder


def swapped(place: Path, seconds: float) -> dict[str, float]:
    """Times of replies, in ms, while a server takes over newer weights, and otherwise.

    A client asks every 20 ms, and begins an episode at every 20th request. Newer weights appear every 12 s. A reply
    counts as one of the swap if it came in the 3 s before the server said that new episodes act with other weights, in which it
    reads and copies them, or in the second after, in which an episode begins with them.
    """
    from websockets.sync.client import connect

    from tiphys.pretrain.follow.writer import How
    from tiphys.pretrain.publish import publish

    versions = max(2, int(seconds / _EVERY) + 1)
    for number in range(versions):  # published beforehand, so that nothing but the server works while it is measured
        publish(policy(place / f"policy{number}", number), str(place / "built"), how=How())
        shutil.copytree(place / "built", place / f"version{number}")
    shutil.copytree(place / "version0", place / "published")
    command = [sys.executable, "-m", "tiphys", "serve", str(place / "published"), "--follow", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    swaps: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        assert server.stdout is not None
        for line in server.stdout:
            if "new episodes act" in line:
                swaps.append(time.monotonic())

    def renew() -> None:
        for number in range(1, versions):
            if stop.wait(_EVERY):
                return
            new = place / f"version{number}"
            shutil.copytree(new, place / "published", dirs_exist_ok=True, ignore=shutil.ignore_patterns("latest.json"))
            shutil.copy(new / "latest.json", place / "published" / "latest.tmp")
            (place / "published" / "latest.tmp").replace(place / "published" / "latest.json")

    try:
        assert server.stdout is not None
        url = next(word for word in server.stdout.readline().split() if word.startswith("ws://"))
        threads = [threading.Thread(target=watch, daemon=True), threading.Thread(target=renew)]
        found: list[tuple[float, float]] = []
        with connect(url, compression=None, max_size=None) as connection:
            connection.recv()
            for thread in threads:
                thread.start()
            end, number = time.monotonic() + seconds, 0
            while time.monotonic() < end:
                if number % 20 == 0:
                    connection.send(wire.encode({"endpoint": "reset"}))
                    connection.recv()
                began = time.monotonic()
                connection.send(wire.encode({"observation": np.zeros(STATE, np.float32)}))
                connection.recv()
                found.append((time.monotonic(), (time.monotonic() - began) * 1e3))
                time.sleep(0.02)
                number += 1
        stop.set()
        threads[1].join()
    finally:
        server.terminate()
        server.wait()
    mine = np.array([ms for at, ms in found[20:] if any(s - 3 < at < s + 1 for s in swaps)])
    others = np.array([ms for at, ms in found[20:] if not any(s - 3 < at < s + 1 for s in swaps)])
    out: dict[str, float] = {"swaps": len(swaps)}
    for name, values in (("swap", mine), ("otherwise", others)):
        if len(values):
            out |= {f"{name}, median": float(np.median(values)), f"{name}, 99 %": float(np.quantile(values, 0.99))}
            out[f"{name}, longest"] = float(values.max())
    return out


def measured(url: str, folder: Path, clients: int, steps: int) -> dict[str, Any]:
    """A number of clients, and then the policy in this process with as many environments."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=ask, args=(there, url, clients, steps))
    process.start()
    found: dict[str, Any] = here.recv()
    process.join()
    own = Policy.load(folder)
    own.reset("reach", clients)
    seen = [np.zeros(STATE, np.float32)] * clients
    for _ in range(5):
        own.act(seen)
    times = []
    for _ in range(steps // 2):
        began = time.perf_counter()
        own.act(seen)
        times.append(time.perf_counter() - began)
    return {**found, "clients": clients, "policy_rate": clients / statistics.median(times)}


def ask(pipe: Any, url: str, clients: int, steps: int) -> None:
    """In a process of its own: clients that ask again and again."""
    from websockets.sync.client import connect

    taken: list[float] = []
    inferred: list[float] = []
    barrier = threading.Barrier(clients + 1)
    frame = wire.encode({"observation": np.zeros(STATE, np.float32)})

    def act() -> None:
        with connect(url, compression=None, max_size=None) as connection:
            connection.recv()
            for number in range(steps + 5):
                if number == 5:
                    barrier.wait()
                began = time.perf_counter()
                connection.send(frame)
                reply = wire.decode(connection.recv())  # type: ignore[arg-type]
                if number >= 5:
                    taken.append((time.perf_counter() - began) * 1e3)
                    inferred.append(reply["policy_timing"]["infer_ms"])

    threads = [threading.Thread(target=act) for _ in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    for thread in threads:
        thread.join()
    added = statistics.median(a - b for a, b in zip(taken, inferred, strict=True))
    pipe.send(
        {
            "rate": clients * 1e3 / statistics.median(taken),
            "ms": statistics.median(taken),
            "ms99": float(np.quantile(taken, 0.99)),
            "infer_ms": statistics.median(inferred),
            "added_ms": added,
        }
    )


if __name__ == "__main__":
    main()
