"""Hydra finds hoptim's groups from another project, with the checkout and with a wheel alone, and nothing else of conf/."""

import subprocess
import sys
import zipfile

import pytest
from jobs import ROOT, env

import hoptim

APP = """
import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

@hydra.main(version_base="1.3", config_path=".", config_name="mine")
def main(cfg):
    import hoptim
    print(hoptim.__file__)
    print(instantiate(cfg.hoptim.method))
    print(*GlobalHydra.instance().config_loader().get_group_options("", results_filter=None))

main()
"""
MINE = """
defaults:
  - hoptim/solver: neumann
  - hoptim/curvature: exact
  - hoptim/method: implicit
hydra: {output_subdir: null, run: {dir: .}}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    (path,) = folder.glob("*.whl")
    return path


ALONE = """
defaults: [{hoptim/method: implicit}]
hydra: {output_subdir: null, run: {dir: .}}
"""
REVERSED = """
defaults: [{hoptim/method: implicit}, {hoptim/curvature: exact}]
hydra: {output_subdir: null, run: {dir: .}}
"""


def run_app(folder, mine=MINE, *overrides, **environment):
    """What hoptim it imports, the method it makes, and what Hydra offers it at the top."""
    (folder / "app.py").write_text(APP)
    (folder / "mine.yaml").write_text(mine)
    command = [sys.executable, "app.py", *overrides]
    process = subprocess.run(command, cwd=folder, env=env(**environment), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    package, method, names = process.stdout.splitlines()
    return package, method, set(names.split()) - {"_dummy_empty_config_", "hydra"}


def test_another_project_finds_the_groups_of_the_checkout_and_no_other(tmp_path):
    _, method, names = run_app(tmp_path, MINE, "hoptim.solver.terms=7")
    assert "Implicit(solver=Neumann(terms=7, tolerance=0.0, step_size=None" in method
    assert names == {"hoptim", "mine"}


def test_another_project_finds_the_groups_of_a_wheel_and_no_other(tmp_path, wheel):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    project = tmp_path / "project"
    project.mkdir()
    package, method, names = run_app(project, MINE, "hoptim.solver.terms=7", PYTHONPATH=str(site))
    assert str(site) in package
    assert "Implicit(solver=Neumann(terms=7, tolerance=0.0, step_size=None" in method
    assert names == {"hoptim", "mine"}


@pytest.mark.parametrize(
    ("mine", "overrides", "method"),
    [
        (ALONE, (), hoptim.Implicit()),
        (ALONE, ("hoptim.method.damping=0.5", "+hoptim/solver=cg"), hoptim.Implicit(hoptim.CG(), damping=0.5)),
        (REVERSED, (), hoptim.Implicit(curvature=hoptim.Exact())),
    ],
)
def test_the_method_composes_from_another_project_without_a_solver_or_a_curvature(tmp_path, mine, overrides, method):
    assert run_app(tmp_path, mine, *overrides)[1] == repr(method)


def test_a_checkout_reads_its_configs_live():
    assert (ROOT / "hoptim" / "conf" / "hoptim").samefile(ROOT / "conf" / "hoptim")


def test_the_wheel_carries_the_configs_of_hoptim_and_no_others(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {f"hoptim/{path.relative_to(ROOT)}" for path in (ROOT / "conf" / "hoptim").rglob("*.yaml")}
    assert {name for name in names if name.endswith(".yaml")} == ours
    assert {"hydra_plugins/hoptim_config.py", "hoptim/py.typed"} <= names
    assert "hoptim/config.py" not in names, "the plugin is only where Hydra looks for it"
    assert not [name for name in names if name.startswith(("scripts", "tests"))]


def test_the_plugin_imports_neither_torch_nor_hoptim():
    code = "import sys, hydra_plugins.hoptim_config; print(sorted({'torch', 'hoptim'} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
