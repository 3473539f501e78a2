"""Hydra finds hoptim's groups from another project: with the checkout, and with a wheel alone."""

import subprocess
import sys
import zipfile

import pytest
from jobs import ROOT, env

APP = """
import hydra
from hydra.utils import instantiate

@hydra.main(version_base="1.3", config_path=".", config_name="mine")
def main(cfg):
    import hoptim
    print(hoptim.__file__)
    print(instantiate(cfg.hoptim.method))

main()
"""
MINE = """
defaults:
  - hoptim/solver: neumann
  - hoptim/curvature: exact
  - hoptim/method: implicit
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    return path


def run_app(folder, **environment):
    (folder / "app.py").write_text(APP)
    (folder / "mine.yaml").write_text(MINE)
    command = [sys.executable, "app.py", "hoptim.solver.terms=7"]
    process = subprocess.run(command, cwd=folder, env=env(**environment), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_another_project_finds_the_groups_of_the_checkout(tmp_path):
    assert "Implicit(solver=Neumann(terms=7, step_size=None" in run_app(tmp_path)


def test_another_project_finds_the_groups_of_a_wheel(tmp_path, wheel):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    project = tmp_path / "project"
    project.mkdir()
    printed = run_app(project, PYTHONPATH=str(site))
    assert str(site) in printed
    assert "Implicit(solver=Neumann(terms=7, step_size=None" in printed


def test_the_wheel_carries_every_config_and_no_scripts(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"hoptim/{path.relative_to(ROOT)}" in names
    assert "hydra_plugins/hoptim_config.py" in names
    assert not [name for name in names if name.startswith(("scripts", "tests"))]


def test_the_plugin_imports_neither_torch_nor_hoptim():
    code = "import sys, hydra_plugins.hoptim_config; print(sorted({'torch', 'hoptim'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
