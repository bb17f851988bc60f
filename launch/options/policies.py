"""Options of the commands for policies."""

from __future__ import annotations

from typing import Any

from tiphys.launch.options.shared import asking_arguments, sample_argument


def add(commands: Any) -> None:
    """Add these commands to the parser of `tiphys`."""
    for command in (_evaluate, _serve, _label, _bootstrap, _say, _publish):
        command(commands)


def _evaluate(commands: Any) -> None:
    p = commands.add_parser("evaluate", help="let a policy act in its environments and score it")
    p.add_argument("policy", help="folder of a run, folder of a policy, s3://bucket/path or hf://org/name")
    p.add_argument(
        "--tasks",
        nargs="*",
        default=[],
        help="tasks to play (default: every task of the policy that has an environment)",
    )
    p.add_argument("--episodes", type=int, default=40, help="number of episodes of each task (default: %(default)s)")
    p.add_argument(
        "--seed", type=int, default=1_000_000, help="seed of the first episode of each task (default: %(default)s)"
    )
    p.add_argument("--processes", type=int, default=0, help="number of processes (default: one per core)")
    sample_argument(p)
    asking_arguments(p)
    p.add_argument(
        "--target-returns",
        nargs="*",
        default=[],
        metavar="R",
        help="further returns to ask for in turn, with as many episodes for each (default: none)",
    )
    p.add_argument(
        "--out",
        default="",
        help="JSON file for the result (default: evaluation.json beside the policy; none for a bucket or a hub)",
    )
    p.add_argument(
        "--pictures", default="", help="folder for film strips of the first episodes (default: none are made)"
    )
    p.add_argument(
        "--videos",
        type=int,
        default=1,
        help="with --pictures: number of film strips of each task (default: %(default)s)",
    )
    p.add_argument(
        "--demonstrations",
        nargs="*",
        default=[],
        help="datasets that the policy learned from: also report the share of states that they contain (default: none)",
    )
    p.add_argument(
        "--modules",
        nargs="*",
        default=[],
        help="Python modules that environments named module:EnvId may import (default: those of --tasks)",
    )
    p.add_argument(
        "--device", default="", help="torch device, or auto to use all GPUs (default: a GPU if there is one)"
    )
    p.add_argument(
        "--server",
        default="",
        metavar="URL",
        help="ws://HOST:PORT of a `tiphys serve` that serves this policy: it chooses the actions (default: this machine does)",
    )
    p.add_argument("--api-key-file", default="", help="with --server: file with the server's API key (default: none)")
    p.add_argument(
        "--follow",
        action="store_true",
        help="evaluate each step that a run publishes there, until it ends; --out gets a line of JSON for each",
    )
    p.add_argument(
        "--every", type=float, default=10.0, help="with --follow: seconds between two polls (default: %(default)s)"
    )
    p.set_defaults(command="policies.evaluate")


def _serve(commands: Any) -> None:
    p = commands.add_parser("serve", help="let robots and benchmarks use a policy over a WebSocket (openpi, vla-eval)")
    p.add_argument("policy", help="folder of a run, folder of a policy, s3://bucket/path or hf://org/name")
    p.add_argument("--task", default="", help="task of clients that name none (default: the one whose fields fit)")
    p.add_argument(
        "--map",
        dest="renamed",
        nargs="*",
        default=[],
        metavar="CLIENT=FIELD",
        help="names of clients and the fields that they mean, e.g. observation/image=observation.images.top (default: none)",
    )
    p.add_argument(
        "--execute",
        type=int,
        default=0,
        help="actions of a chunk that clients carry out before the next observation (default: all that the policy allows)",
    )
    p.add_argument(
        "--follow",
        action="store_true",
        help="let new episodes act with the newest weights that are published there, by a run that still trains",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    p.add_argument("--port", type=int, default=8000, help="TCP port; 0: a free one (default: %(default)s)")
    p.add_argument("--api-key-file", default="", help="file with the key that clients must send (default: no key)")
    p.add_argument("--open", action="store_true", help="allow another --host without a key: who reaches it may use it")
    p.add_argument("--sessions", type=int, default=64, help="most clients at once (default: %(default)s)")
    p.add_argument("--batch", type=int, default=32, help="most requests of a forward pass (default: %(default)s)")
    p.add_argument(
        "--wait",
        default="5ms",
        help="longest time that a request waits for those of other clients, e.g. 500us, 5ms, 1s (default: %(default)s)",
    )
    sample_argument(p)
    p.add_argument("--seed", type=int, default=0, help="with --sample: seed of the draws (default: %(default)s)")
    p.add_argument(
        "--device", default="", help="torch device, or auto to use all GPUs (default: a GPU if there is one)"
    )
    p.set_defaults(command="policies.serve")


def _label(commands: Any) -> None:
    p = commands.add_parser("label", help="write a dataset with the actions that a policy infers for episodes without")
    p.add_argument(
        "policy", help="policy with an objective that labels (paradigm idm): folder of a run or of a policy, or URL"
    )
    p.add_argument("dataset", help="dataset whose episodes are labelled")
    p.add_argument("to", help="folder or URL of the new dataset")
    p.add_argument("--device", default="", help="torch device (default: a GPU if there is one)")
    p.set_defaults(command="policies.label")


def _bootstrap(commands: Any) -> None:
    p = commands.add_parser("bootstrap", help="write a dataset of transitions that a policy draws and is confident of")
    p.add_argument(
        "policy", help="policy that predicts whole steps (paradigm boot or tt): folder of a run or of a policy, or URL"
    )
    p.add_argument("dataset", help="dataset that the policy was trained on")
    p.add_argument("to", help="folder or URL of the new dataset")
    p.add_argument(
        "--keep", type=float, default=0.1, help="share of the drawn transitions that is kept (default: %(default)s)"
    )
    p.add_argument("--draws", type=int, default=4, help="draws of each window's last transition (default: %(default)s)")
    p.add_argument("--windows", type=int, default=1, help="windows of each episode (default: %(default)s)")
    p.add_argument(
        "--validation", type=float, help="share of episodes that are held out and not used (default: that of the run)"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the windows and draws (default: %(default)s)")
    p.add_argument("--device", default="", help="torch device (default: a GPU if there is one)")
    p.set_defaults(command="policies.bootstrap")


def _say(commands: Any) -> None:
    p = commands.add_parser("say", help="let a policy that has learned texts continue one")
    p.add_argument("policy", help="folder of a run, folder of a policy, s3://bucket/path or hf://org/name")
    p.add_argument("prompt", help="how the text begins")
    p.add_argument("--task", default="", help="task whose texts are meant (default: the first that fits)")
    p.add_argument(
        "--observation",
        default="",
        help="what a caption is about: a picture, DATASET:EPISODE (its last observation) or JSON (default: nothing, a document)",
    )
    p.add_argument("--tokens", type=int, default=128, help="most tokens of the answer (default: %(default)s)")
    p.add_argument(
        "--temperature", type=float, default=1.0, help="0: always the most probable token (default: %(default)s)"
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the most probable tokens that together have this probability (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: %(default)s)")
    p.add_argument("--device", default="", help="torch device (default: a GPU if there is one)")
    p.set_defaults(command="policies.say_job")


def _publish(commands: Any) -> None:
    p = commands.add_parser("publish", help="publish the policy of a run to a folder, a bucket or a model hub")
    p.add_argument("run", help="folder of a run or of a policy, s3://bucket/path or hf://org/name")
    p.add_argument("to", help="folder, s3://bucket/path, or hf://org/name")
    p.add_argument(
        "--public", action="store_true", help="on a hub: create a public repository instead of a private one"
    )
    p.add_argument("--take-over", action="store_true", help="publish there although another run does")
    p.set_defaults(command="policies.publish")
