"""Sphinx: Markdown through MyST, everything local but MathJax; `make docs` treats a warning as an error."""

from importlib.metadata import version as installed_version

project = "manybrains"
author = "The manybrains authors"
copyright = "2026, The manybrains authors"
version = release = installed_version("manybrains")

extensions = ["myst_parser"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # links to `page.md#a-heading` work as they do on GitHub
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"manybrains {release}"
