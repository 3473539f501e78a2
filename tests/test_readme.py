"""The README and the pages of the folders: their code is run, and what they link to and call is there."""

import importlib
import pkgutil
import re
from html.parser import HTMLParser
from importlib.util import find_spec

import doctest_job
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jobs import ROOT, run

import hoptim
from conf import composed

FOLDERS = ["hoptim", *(f"hoptim.{found.name}" for found in pkgutil.iter_modules(hoptim.__path__))]
PAGES = {  # their text, and the folder that their links start from
    "README.md": ((ROOT / "README.md").read_text(), ROOT),
    **{
        path.relative_to(ROOT).as_posix(): (path.read_text(), path.parent)
        for path in sorted((ROOT / "scripts").rglob("README.md"))
    },
    **{name: (importlib.import_module(name).__doc__, ROOT) for name in FOLDERS},
}
UNLISTED = ["hoptim/linalg", "hoptim/validation"]  # in no menu: hoptim.html leads there
README, _ = PAGES["README.md"]


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 200


def test_the_first_code_is_the_quickstart():
    assert blocks("python")[0] == (ROOT / "scripts" / "quickstart.py").read_text()


def test_the_readmes_python_runs_and_the_quickstart_which_comes_first_is_short_and_learning_helps(tmp_path):
    first, *more = blocks("python")
    assert len(first.splitlines()) < 70
    code = "\n".join([first, "print('the rest')", *more])
    (tmp_path / "readme.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{code}")
    process = run(tmp_path / "readme.py", WANDB_MODE="disabled")
    printed, _, _ = process.stdout.partition("the rest\n")
    losses = {name: float(loss) for name, loss in re.findall(r"^(.+?) +test loss ([\d.]+)", printed, re.MULTILINE)}
    assert max(losses["hoptim"], losses["retrained"]) < 0.9 * min(losses[name] for name in ("without", "GCE", "clean alone"))
    shown = next(text for text in blocks("text") if text.startswith("without"))
    pattern = r"[\d.]+"
    assert re.sub(pattern, "N", shown) == re.sub(pattern, "N", printed)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in ("README.md", "scripts/studies/migrating/README.md")]
)
def test_the_code_of_other_pages_is_doctests_which_pytest_runs(page):
    assert blocks("python", PAGES[page][0]) == []


@pytest.mark.parametrize("page", ["curvature", "diagnostics", "methods", "problem", "solvers", "training"])
def test_the_page_of_a_folder_has_a_doctest(page):
    assert ">>> " in PAGES[f"hoptim.{page}"][0]


def test_the_yaml_of_hydras_page_composes(tmp_path):
    (text,) = blocks("yaml", PAGES["hoptim.config"][0])
    (tmp_path / "mine.yaml").write_text(text)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("mine", ["hoptim.solver.terms=7"])
    assert instantiate(cfg.hoptim.method) == hoptim.Implicit(hoptim.Neumann(terms=7), curvature=hoptim.Exact())


def commands():
    texts = [text for page, _ in PAGES.values() for text in blocks("bash", page)]
    lines = [line.split("#")[0].strip() for text in texts for line in text.splitlines()]
    return [line for line in lines if re.match(r"(python |torchrun .*)?scripts/", line)]


@pytest.mark.parametrize("line", commands())
def test_every_command_names_what_there_is(line):
    words = re.findall(r"'[^']*'|\S+", re.sub(r"^(python|torchrun .*?) (?=scripts/)", "", line))
    assert (ROOT / words[0]).is_file()
    overrides = [word.strip("'") for word in words[1:] if "=" in word]
    single = [re.sub(r"=(range\(\d+).*", "=0", re.sub(r"(=[^\[,]+),.*", r"\1", word)) for word in overrides]
    if words[0] in ("scripts/run", "scripts/train.py"):
        if "experiment=iris_optuna" in single and find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
            pytest.skip("hydra-optuna-sweeper is missing")
        assert composed(*(word for word in single if "hydra" not in word)).name


def test_the_table_of_names_is_the_public_ones():
    rows = re.findall(r"^\| `(.+?)` \|", README, re.MULTILINE)
    named = set(re.findall(r"[A-Za-z]\w+", " ".join(rows)))
    results = {"Audit", "Hypergradient"}  # what functions return is named beside them
    assert set(hoptim.__all__) - results <= named
    assert all(f"`{name}`" in README for name in results)


def test_every_status_is_explained():
    assert [status.name for status in hoptim.Status if f"`{status.name}`" not in README] == []


def anchors(text):
    """The anchors that a site makes of Markdown's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    text, folder = PAGES[page]
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        target = (folder / path).resolve()
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text() if path else text), f"{path}#{anchor}"


class Links(HTMLParser):
    """Where a page links to, and its own anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        self.anchors |= {attrs["id"]} if "id" in attrs else set()


def test_the_website_is_whole(tmp_path):
    pytest.importorskip("pdoc", reason="the website is built by pdoc: pip install '.[docs]'")
    run("docs_site/build.py", "--out", tmp_path)
    code = re.compile(r'<div class="pdoc-code codehilite">.*?</div>', re.DOTALL)  # its lines link to themselves alone
    pages = {path: Links(code.sub("", path.read_text())) for path in tmp_path.rglob("*.html")}
    names = ["index", "studies", "migrating", "public", *(name.replace(".", "/") for name in FOLDERS)]
    ours = {tmp_path / f"{name}.html" for name in names}
    assert ours <= set(pages)
    for path, page in pages.items():
        for link in page.links:
            if not re.match(r"https?:|data:", link):
                file, _, anchor = link.partition("#")
                target = (path.parent / file).resolve() if file else path
                assert target.is_file(), f"{path.name}: {link}"
                if anchor and path in ours and target in ours and not anchor.startswith("_"):  # pdoc hides private bases
                    assert anchor in pages[target].anchors, f"{path.name}: {link}"
    assert "hoptim learns hyperparameters by gradient" in (tmp_path / "index.html").read_text()
    words = ("BilevelOptimizer", "Warm-up, rate and schedule", "ImplicitMetaGradientModule", "nanoGPT")
    assert all(word in (tmp_path / "search.js").read_text() for word in words)
    assert not any(re.search(r":class:\s*<code|Initialize internal Module", path.read_text()) for path in ours)
    menu = (tmp_path / "index.html").read_text().partition('<ul class="pages">')[2].partition("</ul>")[0]
    assert [name for name in names if f'href="{name}.html"' not in menu and name not in UNLISTED] == []


def test_the_doctests_of_the_scripts():
    assert int(run(doctest_job.__file__).stdout) >= 12
