"""Build the documentation website: the README.md of each folder as a page, the docstrings below it, and a search.

    scripts/docs                    # writes site/: open site/index.html in a browser
    scripts/docs --serve 8000       # writes it and serves it on http://localhost:8000

Other files that the pages link to are copied into the website. Formulas become MathML, which browsers draw by themselves;
nothing is loaded from elsewhere.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import pkgutil
import re
import shutil
import types
import warnings
from importlib import import_module
from pathlib import Path

import latex2mathml.converter
import pdoc
import pdoc.search

import hoptim

ROOT = Path(__file__).resolve().parents[3]
MENU = {
    "index": "hoptim",
    "hoptim.training": "The training loop",
    "hoptim.problem": "Models and losses",
    "hoptim.recipes": "Recipes: what to tune",
    "hoptim.methods": "Methods",
    "hoptim.solvers": "Solvers and statuses",
    "hoptim.curvature": "Curvatures",
    "hoptim.diagnostics": "The audit",
    "hoptim.tracking": "Trackers",
    "hydra": "Configs for Hydra",
    "studies.migrating": "Coming from betty, TorchOpt, higher, hypertorch",
    "studies": "Studies and costs",
    "hoptim": "All names; how hoptim is built",
}
SINGLE = {"index": "README.md", "changes": "hoptim/CHANGELOG.md", "hydra": "conf/README.md", "studies": "scripts/README.md"}
PUBLIC = ("hoptim", "hoptim.recipes", "hoptim.tracking")
NAME = re.compile(
    rf"(?<![\[`])`({'|'.join(name for name in hoptim.__all__ if name != 'recipes')})(\([^`]*\))?`(?!`)"
)  # such as `CG(terms=20)`
ROLE = re.compile(r":(?:class|meth|func|mod|attr|exc|data):`~?([^`]*)`")  # Sphinx's roles, as in :class:`CG`
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$", re.DOTALL)


def sources() -> dict[str, Path]:
    """The Markdown file of each page, by the page's name, with dots for folders: ``hoptim.solvers``, ``studies.iris``."""
    found = {page: Path(source) for page, source in SINGLE.items()}
    for path in sorted(ROOT.glob("hoptim/**/README.md")):
        found[".".join(path.relative_to(ROOT).parent.parts)] = path.relative_to(ROOT)
    for path in sorted(ROOT.glob("scripts/*/**/README.md")):
        found[f"studies.{path.parent.name}"] = path.relative_to(ROOT)
    return found


def with_formulas(text: str) -> str:
    """The text with MathML in the place of ``$...$`` and ``$$...$$``, except in code."""

    def drawn(match: re.Match[str]) -> str:
        block, inline = match.groups()
        found = latex2mathml.converter.convert(block or inline, display="block" if block else "inline")
        return found.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")

    parts = CODE.split(text)
    return "".join(part if number % 2 else FORMULA.sub(drawn, part) for number, part in enumerate(parts))


def with_links(text: str, source: Path, page: str, pages: dict[str, Path], out: Path) -> str:
    """The text, with its links to files changed to links to pages. A file that is not a page is copied to the website.

    Args:
        text: Markdown, with links relative to the folder of ``source``.
        source: the file that the text is from, relative to the checkout.
        page: the name of the page that shows the text.
        pages: the source of each page.
        out: the folder of the website.
    """
    up, by_source = "../" * page.count("."), {path: name for name, path in pages.items()}

    def replace(match: re.Match[str]) -> str:
        target = (ROOT / source.parent / match["path"]).resolve()
        if target.is_dir():
            return match["text"]
        path = target.relative_to(ROOT)
        shown = by_source.get(path)
        if shown:
            url = f"{shown.replace('.', '/')}.html"
        else:
            url = str(path) if path.suffix in (".png", ".json") else f"{path}.txt"  # browsers show .txt
            (out / url).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, out / url)
        return f"[{match['text']}]({up}{url}{match['anchor'] or ''})"

    text = LINK.sub(replace, text)
    return NAME.sub(rf"[\g<0>]({up}hoptim.html#\1)", text)  # pdoc links public names only on the package's own page


def without_roles(docstring: str) -> str:
    """A docstring as plain Markdown, and nothing for the one that a module's ``__init__`` inherits from torch."""
    return "" if docstring.startswith("Initialize internal Module state") else ROLE.sub(r"`\1`", docstring)


def found_once(modules: dict[str, pdoc.doc.Module], *rest: object) -> list[dict[str, str]]:
    """What the search finds, as pdoc makes it, but each thing once: under its public name if it has one; no files."""
    pages = sources()
    ordered = sorted(modules, key=lambda name: (PUBLIC.index(name) if name in PUBLIC else len(PUBLIC), name))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for item in pdoc.search.make_index({name: modules[name] for name in ordered}, *rest):
        module, name = item["modulename"], item.get("qualname", "")
        if name and not name.endswith("__init__"):
            found.setdefault(modules[module].get(name).taken_from, item)
        elif not name and module in pages:
            found[module, ""] = item
    return list(found.values())


def build(out: Path) -> None:
    """Write the website into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # pdoc then shows the annotation as it is written
    pages = sources()
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).with_name("theme"))
    pdoc.render.env.globals.update(pages=pages, menu=MENU)
    convert = pdoc.docstrings.convert  # these two serve the pages and the search
    pdoc.docstrings.convert = lambda docstring, *rest: convert(without_roles(docstring), *rest)
    pdoc.render.make_index = found_once
    names = ["hoptim", *(found.name for found in pkgutil.walk_packages(hoptim.__path__, "hoptim."))]
    objects = {name: import_module(name) for name in names} | {
        page: types.ModuleType(page) for page in pages if page not in names
    }
    for name in PUBLIC:  # pdoc does not see a name before it is used, if its module loads it then
        vars(objects[name]).update({each: getattr(objects[name], each) for each in objects[name].__all__})
    for page, source in pages.items():
        text = with_links((ROOT / source).read_text(), source, page, pages, out)
        objects[page].__doc__ = with_formulas(text)
    modules = {name: pdoc.doc.Module(found) for name, found in objects.items()}
    for name, found in modules.items():
        path = out / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(found, modules))
    (out / "search.js").write_text(pdoc.render.search_index(modules))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", metavar="DIR", help="default: site")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the website after building it")
    options = parser.parse_args()
    build(options.out)
    print(f"written: {options.out / 'index.html'}")
    if options.serve is not None:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=options.out)
        print(f"http://localhost:{options.serve}, until interrupted")
        http.server.ThreadingHTTPServer(("localhost", options.serve), handler).serve_forever()


if __name__ == "__main__":
    main()
