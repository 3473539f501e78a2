"""The pages for people: their examples run, what they link to and call is there, and the website made of them is whole."""

import doctest
import importlib
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from importlib.util import find_spec

import browser
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from jobs import ROOT, run

import hoptim

ROOMS = sorted(path.parent for path in (ROOT / "hoptim").glob("*/README.md"))
FILES = [
    ROOT / "README.md",
    ROOT / "hoptim" / "README.md",
    *(room / "README.md" for room in ROOMS),
    ROOT / "conf" / "README.md",
]
FILES += [ROOT / "hoptim" / "CHANGELOG.md", *sorted((ROOT / "scripts").rglob("README.md"))]
PAGES = {str(path.relative_to(ROOT)): path for path in FILES}
TEXTS = {page: path.read_text() for page, path in PAGES.items()}
README, HOUSE = TEXTS["README.md"], TEXTS["hoptim/README.md"]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def failures(page, text):
    """How many of a page's examples print something else than is shown. The lines that open and close code are left out."""
    plain = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    found = doctest.DocTestParser().get_doctest(plain, {}, page, page, 0)
    return doctest.DocTestRunner(optionflags=OPTIONS).run(found).failed


@pytest.fixture
def float32():
    """What a script has."""
    torch.set_default_dtype(torch.float32)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if ">>> " in text])
def test_the_examples_of_a_page_print_what_it_shows(page, float32):
    assert failures(page, TEXTS[page]) == 0


def test_a_wrong_example_is_seen(capsys):
    assert failures("page", "Text\n\n```pycon\n>>> 1 + 1\n2\n```\n\n```pycon\n>>> 1 + 1\n3\n>>> 2\n2\n```\n") == 1
    assert "Expected:\n    3\nGot:\n    2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "room", ["curvature", "diagnostics", "methods", "problem", "recipes", "solvers", "tracking", "training"]
)
def test_a_room_has_a_page_with_an_example_which_its_docstring_names(room):
    assert ">>> " in TEXTS[f"hoptim/{room}/README.md"]
    assert f"hoptim/{room}/README.md" in importlib.import_module(f"hoptim.{room}").__doc__


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("scripts/")])
def test_all_python_of_a_page_is_run(page):
    assert blocks("python", TEXTS[page]) == []
    for code in blocks("pycon", TEXTS[page]):
        assert code.startswith(">>> ")


def numbers_as_n(text):
    return re.sub(r"[\d.]+(e-\d+)?", "N", text)


def numbers(text):
    return [float(number) for number in re.findall(r"\d\.\d+", text)]


def test_the_readmes_diff_makes_its_script_of_a_plain_loop_and_prints_what_is_shown():
    path = ROOT / "scripts" / "examples" / "decay.py"
    (diff,), script = blocks("diff", README), [line for line in path.read_text().splitlines() if line.strip()]
    lines = [line for line in diff.splitlines() if line.strip()]
    after, before = ([line[1:] for line in lines if line[0] in signs] for signs in ("+ ", "- "))
    start = script.index(after[0])
    assert script[start : start + len(after)] == after
    assert len([line for line in lines if line[0] == "+"]) <= 10
    assert [line for line in lines if line[0] == "-"] == ["-    loss = criterion(model(x[batch]), y[batch])"]
    compile("\n".join(before), "before", "exec")
    printed, shown = run(path).stdout, blocks("text", README)[0]
    assert numbers_as_n(printed) == numbers_as_n(shown)
    assert numbers(printed) == pytest.approx(numbers(shown), rel=0.35)  # other processors round otherwise for 1,500 steps
    learned, kept = numbers(printed.splitlines()[1])[0], numbers(printed.splitlines()[1])[2]
    assert learned < 0.75 * kept


def test_the_quickstart_is_short_and_learning_helps():
    path = ROOT / "scripts" / "quickstart.py"
    _, docstring, code = path.read_text().split('"""', 2)
    assert len(code.splitlines()) < 70
    printed = run(path, WANDB_MODE="disabled").stdout
    losses = {name: float(loss) for name, loss in re.findall(r"^(.+?) +test loss ([\d.]+)", printed, re.MULTILINE)}
    assert max(losses["hoptim"], losses["retrained"]) < 0.9 * min(losses[name] for name in ("without", "GCE", "clean alone"))
    shown = "".join(f"{line.strip()}\n" for line in docstring.splitlines() if "test loss" in line)
    assert numbers_as_n(printed) == numbers_as_n(shown)


def test_the_yaml_of_hydras_page_composes(tmp_path):
    (text,) = blocks("yaml", TEXTS["conf/README.md"])
    (tmp_path / "mine.yaml").write_text(text)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        cfg = compose("mine", ["hoptim.solver.terms=7"])
    assert instantiate(cfg.hoptim.method) == hoptim.Implicit(hoptim.Neumann(terms=7), curvature=hoptim.Exact())


def commands():
    texts = [text for page in TEXTS.values() for text in blocks("bash", page)]
    lines = [line.split("#")[0].strip() for text in texts for line in text.replace("\\\n", "").splitlines()]
    return sorted({line for line in lines if re.match(r"(python |torchrun .*)?scripts/", line)})


@pytest.mark.parametrize("line", commands())
def test_every_command_names_what_there_is(line):
    words = re.findall(r"'[^']*'|\S+", re.sub(r"^(python|torchrun .*?) (?=scripts/)", "", line))
    assert (ROOT / words[0]).is_file()
    overrides = [word.strip("'") for word in words[1:] if "=" in word]
    single = [re.sub(r"=(range\(\d+).*", "=0", re.sub(r"(=[^\[,]+),.*", r"\1", word)) for word in overrides]
    if words[0] in ("scripts/run", "scripts/train.py"):
        ConfigStore.instance().store(name="schema", node={})  # the types of options, which scripts/train.py has
        if "experiment=iris_optuna" in single and find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
            pytest.skip("hydra-optuna-sweeper is missing")
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            assert compose("train", [word for word in single if "hydra" not in word]).name


def test_nobody_is_told_to_install_somebody_elses_package():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    texts = [path for name in tracked if (path := ROOT / name).suffix in (".md", ".py", ".yaml", ".sh", ".toml", "")]
    wrong = re.compile(r"pip install ['\"]?" + "hoptim")
    assert [str(path) for path in texts if path.is_file() and wrong.search(path.read_text(errors="ignore"))] == []


def test_the_table_of_names_is_the_public_ones():
    rows = re.findall(r"^\| (`.+?) \|", HOUSE, re.MULTILINE)
    assert set(hoptim.__all__) <= set(re.findall(r"`(\w+)", " ".join(rows)))
    recipes = re.findall(r"`(\w+)\(", TEXTS["hoptim/recipes/README.md"])
    assert set(hoptim.recipes.__all__) <= set(recipes)


def test_every_status_is_explained():
    rows = " ".join(re.findall(r"^\| (`[A-Z_`, ]+`) \|", TEXTS["hoptim/solvers/README.md"], re.MULTILINE))
    assert sorted(re.findall(r"\w+", rows)) == sorted(status.name for status in hoptim.Status)


def test_the_table_of_intervals_counts_hypersteps():
    rows = re.findall(
        r"^\| ([\d,]+) \| ([\d,]+) \| (\d+)\D*\| (\d+) \| (\d+) % \|", TEXTS["hoptim/training/README.md"], re.MULTILINE
    )
    assert len(rows) == 3
    for row in rows:
        steps, warmup, every, hypersteps, cost = (int(figure.replace(",", "")) for figure in row)
        assert warmup == steps / 4
        assert hypersteps == (steps - warmup) // every + 1
        assert cost == pytest.approx(100 * 10 * hypersteps / steps, abs=4)


def anchors(text):
    """The anchors that a site makes of Markdown's headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_file_leads_to_one(page):
    text, folder = TEXTS[page], PAGES[page].parent
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        target = (folder / path).resolve()
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text() if path else text), f"{path}#{anchor}"


@pytest.mark.parametrize("folder", ["hoptim", "scripts", "tests", "conf"])
def test_code_names_only_scripts_that_are_there(folder):
    files = [path for kind in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{kind}")]
    named = {(path, found) for path in files for found in re.findall(r"\bscripts/[\w/.]*\w", path.read_text())}
    assert [(path.name, found) for path, found in sorted(named) if not (ROOT / found).exists()] == []


def test_the_pages_are_in_the_wheel(tmp_path):
    pytest.importorskip("hatchling", reason="the wheel is built by hatchling: pip install '.[dev]'")
    from zipfile import ZipFile

    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    assert {page for page in PAGES if page.startswith("hoptim/")} <= names


class Page(HTMLParser):
    """Where a page links to, its own anchors, and its text: all of it, and that which is not code."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.loaded, self.code, self.words = [], set(), [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        self.loaded += [attrs.get({"link": "href"}.get(tag, "src"), "")] * (tag in ("script", "img", "link", "iframe"))
        self.anchors |= {attrs["id"]} if "id" in attrs else set()
        self.code += tag in ("pre", "script", "style")

    def handle_endtag(self, tag):
        self.code -= tag in ("pre", "script", "style")

    def handle_data(self, data):
        self.words += [] if self.code else [data]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("pdoc", "latex2mathml"):
        pytest.importorskip(package, reason=f"the website is built with {package}: pip install '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    run("common/site/build.py", "--out", out)
    return out


@pytest.fixture(scope="module")
def html(site):
    code = re.compile(r'<div class="pdoc-code codehilite">.*?</div>', re.DOTALL)  # its lines link to themselves alone
    return {path: Page(code.sub("", path.read_text())) for path in site.rglob("*.html")}


def test_every_link_of_the_website_leads_to_a_page_and_an_anchor(html):
    ours = {path for path in html if 'class="modulename"' not in path.read_text()}  # the others are pdoc's, of single files
    assert len(ours) > len(PAGES) - 2
    for path, page in html.items():
        for link in page.links:
            if not re.match(r"https?:|data:", link):
                file, _, anchor = link.partition("#")
                target = (path.parent / file).resolve() if file else path
                assert target.is_file(), f"{path.name}: {link}"
                if anchor and {path, target} <= ours and not anchor.startswith("_"):  # pdoc hides private bases
                    assert anchor in html[target].anchors, f"{path.name}: {link}"


def test_the_website_shows_every_page(site, html):
    menu = (site / "index.html").read_text().partition('<ul class="pages">')[2].partition("</ul>")[0]
    assert len(re.findall("href", menu)) >= len(ROOMS)
    for page, text in TEXTS.items():
        (title,) = re.findall(r"^# (.+)$", text, re.MULTILINE)[:1]
        title = re.sub(r"`", "", title)
        assert any(title in unescape("".join(found.words)) for found in html.values()), page


def test_the_website_loads_nothing_from_elsewhere(html):
    for path, page in html.items():
        assert [source for source in page.loaded if re.match(r"(https?:)?//", source)] == [], path.name


def test_the_website_shows_no_roles_and_no_bare_formulas(html):
    for path, page in html.items():
        text = "".join(page.words)
        assert not re.search(r":(class|meth|func|mod|attr|exc|data):", text), path.name
        assert not re.search(r"\$|\\(frac|lambda|top|sum)\b", text), path.name
        assert "Initialize internal Module" not in text
    assert sum("<math" in path.read_text() for path in html) >= 6


def test_the_search_has_each_public_name_once(site):
    text = (site / "search.js").read_text()
    names = re.findall(r'"fullname": ?"([\w.]+)"', text)
    assert len(names) == len(set(names))
    assert not any(name.endswith(".__init__") for name in names)  # a class is one entry
    for room in map(importlib.import_module, ("hoptim", "hoptim.recipes", "hoptim.tracking")):
        for name in set(room.__all__) - {"recipes"}:
            ends = [
                found for found in names if found.endswith(f".{name}") and found.split(".")[-2].islower()
            ]  # no attributes
            assert ends == [f"{room.__name__}.{name}"]
    assert not re.search(r":(class|meth|func):", text)
    for words in ("Warm-up, interval and rate", "ImplicitMetaGradientModule", "nanoGPT"):
        assert words in text


@pytest.mark.skipif(browser.FOUND is None, reason=browser.MISSING)
def test_a_browser_shows_formulas_without_a_network(site):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    page = (site / "hoptim" / "methods.html").as_uri()
    shown = subprocess.run([browser.FOUND, *options, page], capture_output=True, text=True, timeout=120).stdout
    assert "<mfrac>" in shown


def test_the_doctests_of_the_scripts():
    files = [str(path) for path in sorted((ROOT / "scripts").rglob("*.py")) if ">>> " in path.read_text()]
    options = ["--doctest-modules", "--import-mode=importlib", "-q", "-o", "addopts=", "-o", "pythonpath=scripts"]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *files]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert int(re.search(r"(\d+) passed", process.stdout)[1]) >= len(files)
