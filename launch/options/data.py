"""Options of the commands for datasets."""

from __future__ import annotations

from typing import Any

from tiphys.launch.options.shared import asking_arguments


def add(commands: Any) -> None:
    """Add these commands to the parser of `tiphys`."""
    for command in (_collect, _environments, _convert, _export, _inspect, _verify, _index, _dataset, _loader_bench):
        command(commands)


def _collect(commands: Any) -> None:
    p = commands.add_parser("collect", help="let an expert act in environments and record its episodes as a dataset")
    p.add_argument(
        "tasks",
        nargs="+",
        help="environments, e.g. BabyAI-GoToRedBallGrey-v0 CartPole-v1, or module:EnvId for one of your own",
    )
    p.add_argument("--to", required=True, help="folder or URL of the new dataset (required)")
    p.add_argument("--episodes", type=int, default=1000, help="number of episodes of each task (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="seed of the first episode of each task (default: %(default)s)")
    p.add_argument(
        "--noise",
        type=float,
        default=-1.0,
        help="largest disturbance of the executed action; each episode draws its own between 0 and this. Continuous actions: "
        "standard deviation in half-ranges; discrete ones: probability of a random action. 0: none; "
        "-1: the usual value of the environment family (default: -1)",
    )
    p.add_argument(
        "--record",
        choices=("intended", "executed"),
        default="intended",
        help="intended: record the action that the expert chose, so that a policy learns to correct errors. executed: record the "
        "disturbed one, so that episodes differ in quality and returns are those of the recorded actions; for objectives that "
        "read returns, or the effects of actions (default: %(default)s)",
    )
    p.add_argument("--processes", type=int, default=0, help="number of processes (default: one per core)")
    _expert_arguments(p)
    asking_arguments(p)
    p.set_defaults(command="data.collect")


def _expert_arguments(p: Any) -> None:
    p.add_argument(
        "--policy",
        default="",
        help="expert to use: folder of a Tiphys policy, zip of a Stable-Baselines3 agent, or module:name of a function of the "
        "observation or of a class with act(observation) (default: the expert of the environment family)",
    )
    p.add_argument(
        "--trust-policy",
        action="store_true",
        help="open the zip of --policy: it contains pickles, which can run any code",
    )


def _environments(commands: Any) -> None:
    p = commands.add_parser("environments", help="list the environments that are installed")
    p.add_argument("contains", nargs="?", default="", help="list only names that contain this text")
    p.set_defaults(command="data.environments")


def _convert(commands: Any) -> None:
    p = commands.add_parser("convert", help="convert data of another format into a dataset")
    p.add_argument("source", help="path or URL of a file or folder")
    p.add_argument("destination", help="folder or URL of the new dataset")
    p.add_argument("--from", dest="format", default="", help="format of the source (default: detected)")
    p.add_argument(
        "--map",
        dest="mapping",
        default="",
        help="mapping file (YAML) that renames fields and sets roles, tasks and bounds (default: none)",
    )
    p.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out malformed episodes and count them by reason, instead of stopping",
    )
    p.add_argument("--processes", type=int, default=0, help="parts converted at the same time (default: one per core)")
    p.add_argument(
        "--on",
        choices=("local", "ray"),
        default="local",
        help="convert on this machine or on a Ray cluster (default: local)",
    )
    p.set_defaults(command="data.convert")


def _export(commands: Any) -> None:
    p = commands.add_parser("export", help="write a dataset as Minari HDF5, LeRobot v3 or NPZ")
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument("destination", help="new or empty folder or URL")
    p.add_argument(
        "--to", dest="format", required=True, choices=("minari", "lerobot", "npz"), help="format to write (required)"
    )
    p.set_defaults(command="data.export")


def _inspect(commands: Any) -> None:
    p = commands.add_parser("inspect", help="show tasks, fields, lengths and returns of a dataset")
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    p.add_argument("--episode", type=int, default=-1, help="show this episode, from 0 (default: the whole dataset)")
    p.add_argument(
        "--picture", default="", help="with --episode: also write its frames to this .png or .gif (default: none)"
    )
    p.set_defaults(command="data.inspect")


def _verify(commands: Any) -> None:
    p = commands.add_parser("verify", help="check every byte of a dataset")
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument(
        "--repair",
        action="store_true",
        help="remove broken episodes from the index; rebuild the index if it is damaged",
    )
    p.add_argument("--full", action="store_true", help="also decode every picture, video and text")
    p.set_defaults(command="data.verify")


def _index(commands: Any) -> None:
    p = commands.add_parser(
        "index",
        help="use a LeRobot dataset, or WebDataset image-text tars, as a dataset, without rewriting its videos or tars",
    )
    p.add_argument("dataset", help="folder or URL of the LeRobot dataset or of the tars, or hf://datasets/OWNER/NAME")
    p.add_argument(
        "destination",
        nargs="?",
        default="",
        help="new folder or URL of the index (default: for tars, beside them; for LeRobot, NAME.tiphys beside the folder, or a "
        "folder of the cache)",
    )
    p.add_argument(
        "--crc", action="store_true", help="LeRobot: read all video and store checksums, so that damage is noticed"
    )
    p.add_argument(
        "--tolerance",
        type=float,
        default=None,
        help="LeRobot: seconds between the time of a row and of its picture (default: 0.0001)",
    )
    p.add_argument("--skip-bad", action="store_true", help="LeRobot: leave out malformed episodes and list them")
    p.set_defaults(command="data.index")


def _dataset(commands: Any) -> None:
    parser = commands.add_parser(
        "dataset", help="merge, split, filter or append datasets, or measure what 0 and 1 mean in an evaluation"
    )
    actions = parser.add_subparsers(title="actions", metavar="", required=True)
    for action in (_merge, _append, _split, _lengths, _filter, _scores):
        action(actions)


def _merge(actions: Any) -> None:
    p = actions.add_parser("merge", help="one dataset out of several; no shard is copied")
    p.add_argument("destination", help="folder or URL of the new dataset")
    p.add_argument("datasets", nargs="+", help="datasets to merge; they must stay where they are")
    p.set_defaults(command="data.merge")


def _append(actions: Any) -> None:
    p = actions.add_parser("append", help="add the episodes of other datasets to a dataset; no shard is copied")
    p.add_argument("dataset", help="dataset to extend")
    p.add_argument("more", nargs="+", help="datasets to add; they must stay where they are")
    p.set_defaults(command="data.append")


def _split(actions: Any) -> None:
    p = actions.add_parser("split", help="two datasets out of one, by a hash of the episode ids; no shard is copied")
    p.add_argument("dataset", help="dataset to split; it must stay where it is")
    p.add_argument("first", help="folder or URL of the first new dataset")
    p.add_argument("second", help="folder or URL of the second new dataset")
    p.add_argument(
        "--share",
        type=float,
        default=0.1,
        help="fraction of the episodes that go to the second, about, because a hash of its id decides for each episode "
        "(default: %(default)s)",
    )
    p.set_defaults(command="data.split")


def _lengths(actions: Any) -> None:
    p = actions.add_parser(
        "lengths", help="count the tokens of texts that change from step to step, so that plans know them"
    )
    p.add_argument(
        "recipe", help="recipe whose datasets and tokenizer are meant; the counts are written beside the datasets"
    )
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values to use instead of the recipe's")
    p.set_defaults(command="data.lengths")


def _filter(actions: Any) -> None:
    p = actions.add_parser(
        "filter", help="a dataset of the episodes that meet every given condition; no shard is copied"
    )
    p.add_argument("dataset", help="dataset to choose from; it must stay where it is")
    p.add_argument("destination", help="folder or URL of the new dataset")
    p.add_argument("--tasks", nargs="*", default=[], help="task names; * and ? match any text (default: all tasks)")
    p.add_argument("--min-return", type=float, default=None, help="smallest undiscounted return (default: no limit)")
    p.add_argument(
        "--top",
        type=float,
        default=None,
        help="fraction of each task with the highest returns, after the other conditions (default: all)",
    )
    p.add_argument("--success", action="store_true", help="only episodes that are known to have succeeded")
    p.add_argument("--min-steps", type=int, default=None, help="smallest number of actions (default: no limit)")
    p.set_defaults(command="data.filter")


def _scores(actions: Any) -> None:
    p = actions.add_parser(
        "scores",
        help="measure random actions and the expert in the environments of the tasks, and store the means in the dataset: "
        "they are 0 and 1 of an evaluation",
    )
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument(
        "--tasks",
        nargs="*",
        default=[],
        help="task names; * and ? match any text (default: all tasks that have an environment)",
    )
    p.add_argument("--episodes", type=int, default=30, help="episodes of each score (default: %(default)s)")
    p.add_argument("--processes", type=int, default=0, help="number of processes (default: one per core)")
    _expert_arguments(p)
    p.add_argument(
        "--modules",
        nargs="*",
        default=[],
        help="Python modules that environments named module:EnvId may import (default: none)",
    )
    p.set_defaults(command="data.scores")


def _loader_bench(commands: Any) -> None:
    p = commands.add_parser(
        "loader-bench", help="measure where a loader's time and bytes go, beside the theoretical bound"
    )
    p.add_argument("dataset", help="folder or URL of the dataset")
    p.add_argument("--steps", type=int, default=200, help="number of batches to load (default: %(default)s)")
    p.add_argument("--rows", type=int, default=64, help="rows of a batch, one window each (default: %(default)s)")
    p.add_argument("--window", type=int, default=20, help="episode steps of a window (default: %(default)s)")
    p.add_argument("--cache", default="256MiB", help="memory of the loader's cache (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.set_defaults(command="data.loader_bench")
