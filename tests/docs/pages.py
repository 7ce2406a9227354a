"""The pages for users, and what stands in them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATTERNS = ("*.md", "guides/*.md", "concepts/*.md", "reference/**/*.md", "results/*.md", "results/*/notes.md")
PAGES = [ROOT / "README.md", *(page for pattern in PATTERNS for page in sorted((ROOT / "docs").glob(pattern)))]


def name(page):
    """A page as a test calls it."""
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The code of a language on a page, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page):
    """The commands that a page tells to type, in words."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]
