"""MkDocs hooks: the site takes pages from the whole repository, and the options of every job from its parser.

Files keep their paths in the repository, so a relative link that works on a forge works on the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from option_tables import JOBS, markdown

ROOT = Path(__file__).parents[1]
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/style.css")
LINK = re.compile(r"\]\(([^)#:\s]+)")
OPTIONS = "<!-- options -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of docs/ and benchmarks/, others by name, and every file that they link to."""
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *(ROOT / name for name in OTHERS)]
    paths = {path.relative_to(ROOT).as_posix() for path in pages}
    for page in sorted(paths):
        for link in LINK.findall((ROOT / page).read_text()):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
            if (ROOT / target).is_file():
                paths.add(target)
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*of_theme, *(_file(path, config) for path in sorted(paths))])


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the options where a page asks for them."""
    return text.replace(OPTIONS, "\n".join(map(markdown, JOBS))) if OPTIONS in text else text


def _file(path: str, config: MkDocsConfig) -> File:
    """A file of the repository; docs/ is the root of the site, measurements are under results/."""
    place = path.removeprefix("docs/").replace("benchmarks/", "results/")
    stem, extension = posixpath.splitext(place.lower())
    is_page = extension == ".md" and stem != "index"
    target = f"{stem}/index.html" if is_page else "index.html" if stem == "index" else place
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=target)
