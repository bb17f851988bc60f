"""An installed package: one import name, everything that a run needs, no conflict with packages of other projects."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

RECIPE = """
name: wheel
data: {mixture: [{dataset: cart, objective: bc}], validation: 0.0}
objectives: {bc: {context: 64, window: 8}}
model: {layers: 2, hidden: 32, heads: 2, text_vocabulary: 300}
train: {steps: 2}
deepspeed:
  train_batch_size: 4
  optimizer: {type: AdamW, params: {lr: 1e-3}}
  zero_optimization: {stage: 1}
run: {dir: run}
"""
ACT = """
import sys
from pathlib import Path
import gymnasium
from transformers import AutoModel

[step] = Path("published/steps").iterdir()
policy = AutoModel.from_pretrained(step, trust_remote_code=True).policy("CartPole-v1")
assert policy.act(gymnasium.make("CartPole-v1").reset(seed=0)[0]) in (0, 1)
assert not any(name.split(".")[0] == "tiphys" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of this checkout."""
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source") / "tiphys"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:  # build in a copy, because building leaves files behind
        origin, copy = REPOSITORY / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_symlink():
            copy.symlink_to(os.readlink(origin))
        elif origin.is_file():
            copy.write_bytes(origin.read_bytes())
    for what in ("sdist", "wheel"):
        code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(out)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_the_wheel_and_the_sdist_are_complete(built: Path) -> None:
    wheel, sdist = next(built.glob("*.whl")), next(built.glob("*.tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"tiphys", "tiphys-0.1.0.dist-info"}
    folders = [REPOSITORY / name for name in ("dataio", "pretrain", "recipes", "launch")]
    files = [p.relative_to(REPOSITORY) for folder in folders for p in folder.rglob("*")]
    wanted = [p for p in files if p.suffix in (".py", ".yaml", ".css")]
    assert len(wanted) > 150
    assert {f"tiphys/{p}" for p in wanted} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"tiphys/{p}" for p in wanted} | {"LICENSE", "README.md", "pyproject.toml"} <= packed
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.envs
def test_a_wheel_works_beside_packages_named_like_our_source_folders(built: Path, tmp_path: Path) -> None:
    """ROS 2, for example, has a package `launch`."""
    pytest.importorskip("gymnasium")
    added = _fresh_environment(tmp_path / "venv", next(built.glob("*.whl")))
    assert added == {"tiphys", "tiphys-0.1.0.dist-info"}
    others = tmp_path / "others"
    for name in ("launch", "recipes", "dataio", "pretrain"):
        (others / name).mkdir(parents=True)
        (others / name / "__init__.py").write_text(
            f'raise ImportError("this is the package {name} of another project")\n'
        )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE")},
        "PYTHONPATH": str(others),
        "PATH": f"{tmp_path / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "TIPHYS_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
    }

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    run("tiphys", "collect", "CartPole-v1", "--episodes", "4", "--to", "cart", "--processes", "1")
    run("tiphys", "train", "recipe.yaml", "--processes", "1")
    run("tiphys", "publish", "run", "published")
    run("python", "-c", textwrap.dedent(ACT))
    run("python", "-m", "tiphys", "objectives")


def _fresh_environment(folder: Path, wheel: Path) -> set[str]:
    """Make a virtual environment with the wheel and the libraries of ours. Returns what the wheel added to site-packages."""
    venv.create(folder, with_pip=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    # Python searches the folders that a .pth file names, but reads no .pth files in them. So our editable install is not seen.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    before = {p.name for p in site.iterdir()}
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    launcher = folder / "bin" / "deepspeed"
    launcher.write_text(f"#!{python}\nfrom deepspeed.launcher.runner import main\nmain()\n")
    launcher.chmod(0o755)
    return {p.name for p in site.iterdir()} - before
