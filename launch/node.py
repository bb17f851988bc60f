"""The process that DeepSpeed's launcher runs in. It is started by `tiphys.launch.supervise`, which stays small.

    python -m tiphys.launch.node READ WRITE

READ and WRITE are file descriptors. The supervisor sends lines of JSON. `{"check": …}`: the recipe is checked; the answer is a
line with what the supervisor must know about it. `{"fit": …}`: the answer is a layout on fewer ranks, or why there is none.
`{"run": …}`: the ranks are started. On one machine, DeepSpeed's launcher of one machine (`deepspeed.launcher.launch`) runs in
this very process, which imported DeepSpeed while the supervisor did something else. For several hosts this process becomes the
command `deepspeed`.
"""

# No `from __future__`: with an empty entry in PYTHONPATH it could come from the current folder.
import sys

from tiphys.dataio.python_path import leave_current_folder

if __name__ == "__main__":
    leave_current_folder()

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tiphys.launch.parents import PARENT, die_with_parent
from tiphys.launch.statuses import Status


def main() -> int:
    reading, writing, parent = (int(word) for word in sys.argv[1:4])
    die_with_parent(parent)
    with open(reading, encoding="utf-8") as requests, open(writing, "w", encoding="utf-8") as answers:
        for line in requests:
            request = json.loads(line)
            if "check" in request:
                status = _check(request["check"], answers)
                if status:
                    return status
            elif "fit" in request:
                answers.write(json.dumps(_fit(request["fit"])) + "\n")
                answers.flush()
            elif "import" in request:
                _import()
            else:
                break
        else:
            return Status.TERMINATED  # the supervisor has closed its end: there is nothing to run
    run = request["run"]
    if run["folder"]:
        os.chdir(run["folder"])
    if run["module"] is None:
        os.execve(run["words"][0], run["words"], os.environ)
    return _launch(run["module"], run["words"])


def _check(asked: dict[str, Any], answers: IO[str]) -> int:
    """Check a recipe and answer with what the supervisor must know. Returns the status of an error, which was shown, or 0."""
    from tiphys.launch.check import check
    from tiphys.launch.refusals import show, status_of

    try:
        recipe = check(
            asked["recipe"],
            asked["overrides"],
            world=asked["world"],
            environments=asked["environments"],
        )
        run_dir = Path(recipe.run.dir).absolute()
        answer = {
            "run_dir": str(run_dir),
            "deadline": recipe.checkpoint.deadline,
            "attempts": recipe.restart.attempts,
            "shrink": recipe.restart.shrink,
        }
    except KeyboardInterrupt:
        return Status.INTERRUPTED
    except Exception as error:
        status = status_of(error)
        show(error, status, with_traceback=asked["traceback"])
        return status
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


def _fit(asked: dict[str, Any]) -> dict[str, Any]:
    """What `shrink.fewer_ranks` returns, or in words why the run does not fit."""
    from tiphys.launch.refusals import sentence
    from tiphys.launch.shrink import fewer_ranks

    try:
        return asdict(fewer_ranks(asked["recipe"], asked["overrides"], asked["world"], asked["before"], asked["each"]))
    except Exception as error:
        return {"why": " ".join(sentence(error).split())}


def _import() -> None:
    """Import what `_launch` needs, ahead of time."""
    import deepspeed.launcher.launch  # noqa: F401


def _launch(module: str, words: list[str]) -> int:
    from deepspeed.launcher import launch

    os.environ[PARENT] = str(os.getpid())
    sys.argv = [module, *words]
    launch.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
