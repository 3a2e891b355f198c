"""How the pages are built: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import clicktrain_jax  # noqa: E402

project = "clicktrain-jax"
release = version = clicktrain_jax.__version__
html_title = f"{project} {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path, html_css_files = ["_static"], ["pages.css"]
html_show_copyright = False
html_copy_source = False
myst_enable_extensions = ["colon_fence"]
# Headings that other pages link to, as page.md#heading.
myst_heading_anchors = 3
# What stands between single backticks in a docstring is code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
exclude_patterns = ["_build"]


def _indented_lines_are_code(app, what, name, obj, options, lines):
    """An indented block that no section's title stands over is an example: RST wants to be told."""
    before, inside, marked = "", False, []
    for line in lines:
        indented = line.startswith("    ")
        begins = indented and not inside and marked and not marked[-1] and before and not before.startswith(" ")
        if begins and not before.endswith(":"):
            marked += ["::", ""]
        inside = indented or (inside and not line)
        marked.append(line)
        before = line or before
    lines[:] = marked


def setup(app):
    """Called by Sphinx."""
    # Before napoleon, which indents what it makes of sections.
    app.connect("autodoc-process-docstring", _indented_lines_are_code, priority=400)
