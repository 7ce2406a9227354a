"""How Sphinx builds the pages: `sphinx-build -W -b html docs build/site`."""

import re

from repvgg_jax.version import VERSION

project = "repvgg_jax"
author = "the repvgg_jax authors"
copyright = "the repvgg_jax authors, Apache License 2.0"
version = release = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
# Tables that the benchmarks wrote begin below a page's title.
suppress_warnings = ["myst.header"]
nitpicky = True
# Types of other libraries, whose pages a strict build must not fetch.
nitpick_ignore_regex = [(r"py:.*", r"(?!repvgg_jax).*"), (r"py:.*", r".*\.Variables")]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "pydata_sphinx_theme"
html_title = f"repvgg_jax {VERSION}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}


def setup(app):
    """Read docstrings as they are written: names stand in single backticks, as in Markdown."""
    app.connect("autodoc-process-docstring", _single_backticks, priority=900)
    app.connect("autodoc-skip-member", _skip_fields_of_tuples)


def _single_backticks(app, what, name, obj, options, lines):
    text = re.sub(r"(?<![`:\w])`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    lines[:] = text.split("\n")


def _skip_fields_of_tuples(app, what, name, obj, skip, options):
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None
