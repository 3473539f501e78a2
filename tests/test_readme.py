"""The README's code is run, its quickstart is scripts/quickstart.py to the letter, and its commands are the project's."""

import re
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from jobs import ROOT, env

import hoptim

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_first_code_is_the_quickstart():
    assert blocks("python")[0] == (ROOT / "scripts" / "quickstart.py").read_text()


def test_the_quickstart_is_short_and_learning_helps():
    script = ROOT / "scripts" / "quickstart.py"
    assert len(script.read_text().splitlines()) < 60
    printed = subprocess.run([sys.executable, script], env=env(), capture_output=True, text=True, check=True).stdout
    losses = dict(re.findall(r"^(without|with) .*test loss ([\d.]+)", printed, re.MULTILINE))
    assert float(losses["with"]) < 0.6 * float(losses["without"])
    shown = next(text for text in blocks("text") if text.startswith("without"))
    pattern = r"[\d.]+"
    assert re.sub(pattern, "N", shown) == re.sub(pattern, "N", printed)


def test_the_readmes_python_runs(tmp_path):
    code = "\n".join(blocks("python"))
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env(WANDB_MODE="disabled"), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def commands():
    lines = [line.split("#")[0].strip() for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if line.startswith(("scripts/", "python scripts/"))]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_names_what_there_is(line):
    words = re.findall(r"'[^']*'|\S+", line.removeprefix("python "))
    assert (ROOT / words[0]).is_file()
    overrides = [word.strip("'") for word in words[1:] if "=" in word]
    single = [re.sub(r"=(range\(\d+).*", "=0", re.sub(r"(=[^\[,]+),.*", r"\1", word)) for word in overrides]
    if words[0] in ("scripts/run", "scripts/train.py"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            assert compose("train", [word for word in single if "hydra" not in word]).name


def test_the_table_of_names_is_the_public_ones():
    rows = re.findall(r"^\| `(.+?)` \|", README, re.MULTILINE)
    named = set(re.findall(r"[A-Za-z]\w+", " ".join(rows)))
    assert set(hoptim.__all__) <= named


def test_every_status_is_explained():
    assert [status.name for status in hoptim.Status if f"`{status.name}`" not in README] == []


def test_every_link_to_a_file_leads_to_one():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
