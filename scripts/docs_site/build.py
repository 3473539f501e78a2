"""Build the documentation website from the docstrings, with README.md as its front page and with a search.

    scripts/docs                    # writes site/: open site/index.html in a browser
    scripts/docs --serve 8000       # writes it and serves it on http://localhost:8000

Other files that the pages link to are copied into the website.
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

import jinja2
import pdoc

import hoptim

ROOT = Path(__file__).resolve().parents[2]
FRONT = {  # pages that are Markdown files
    "index": "README.md",
    "studies": "scripts/README.md",
    "migrating": "scripts/examples/migrating/README.md",
    "public": "scripts/examples/public/README.md",
}
NAME = re.compile(rf"(?<![\[`])`({'|'.join(hoptim.__all__)})(\([^`]*\))?`(?!`)")  # such as `CG(terms=20)`
ROLE = re.compile(r":(?:class|meth|func|mod|attr):(?=`)")  # Sphinx's roles, as in :class:`CG`, which pdoc does not need
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?!https?:)(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")


def page_of(path: Path) -> str | None:
    """The page that shows a file of the checkout, such as ``hoptim/solvers.html`` for ``hoptim/solvers/__init__.py``."""
    for page, source in FRONT.items():
        if path == Path(source):
            return f"{page}.html"
    if path.parts[:1] == ("hoptim",) and path.suffix == ".py":
        return f"{path.parent if path.name == '__init__.py' else path.with_suffix('')}.html"
    return None


def with_names(text: str, page: str) -> str:
    """The text with links from hoptim's public names to their documentation; pdoc links them only on the package's page."""
    return NAME.sub(rf"[\g<0>]({'../' * page.count('/')}hoptim.html#\1)", text)


def with_links(text: str, folder: Path, page: str, out: Path) -> str:
    """The text, with its links to files changed to links to pages. A file that is not a page is copied to the website.

    Args:
        text: Markdown, with links relative to ``folder``.
        folder: a folder of the checkout, relative to its root.
        page: the page that shows the text, relative to ``out``.
        out: the folder of the website.
    """
    up = "../" * page.count("/")

    def replace(match: re.Match[str]) -> str:
        source = (ROOT / folder / match["path"]).resolve()
        if source.is_dir():
            return match["text"]
        path = source.relative_to(ROOT)
        target = page_of(path) or (str(path) if path.suffix in (".png", ".json") else f"{path}.txt")  # browsers show .txt
        if page_of(path) is None:
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, out / target)
        return f"[{match['text']}]({up}{target}{match['anchor'] or ''})"

    return LINK.sub(replace, text)


@jinja2.pass_context
def to_markdown(context: jinja2.runtime.Context, docstring: str) -> str:
    """pdoc's filter, without Sphinx's roles and without the docstring that the ``__init__`` of a module has from torch."""
    text = "" if docstring.startswith("Initialize internal Module state") else ROLE.sub("", docstring)
    return pdoc.render_helpers.to_markdown_with_context(context, text)


def build(out: Path) -> None:
    """Write the website into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", "Error parsing type annotation")  # pdoc then shows the annotation as it is written
    pdoc.render.configure(docformat="google", math=True, template_directory=Path(__file__).with_name("theme"))
    pdoc.render.env.globals["fronts"] = FRONT
    pdoc.render.env.filters["to_markdown"] = to_markdown
    modules = {}
    for name in ("hoptim", *(found.name for found in pkgutil.walk_packages(hoptim.__path__, "hoptim."))):
        module = import_module(name)
        page = name.replace(".", "/")
        text = with_links(module.__doc__ or "", Path(), page, out)
        module.__doc__ = with_names(text, page) if hasattr(module, "__path__") and module is not hoptim else text
        modules[name] = pdoc.doc.Module(module)
    for page, source in FRONT.items():
        text = with_links((ROOT / source).read_text(), Path(source).parent, page, out)
        modules[page] = pdoc.doc.Module(types.ModuleType(page, with_names(text, page)))
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
