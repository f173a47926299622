"""A hook of MkDocs: pages and files outside docs/ join the site, and links between the two folders are mended."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.cff"), *ROOT.glob("recipes/*")]:
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the site README.md lies beside the pages of docs/."""
    return markdown.replace("](docs/", "](").replace("](../", "](")
