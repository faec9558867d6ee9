"""The site: ``make docs``. Pages are Markdown that reads on its own too, with relative links."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mmprune  # noqa: E402

project = 'mmprune'
author = 'the authors of mmprune'
version = release = mmprune.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']

# Links to headings are those that a repository's pages have; the glossary is a definition list.
myst_heading_anchors = 4
myst_enable_extensions = ['deflist']
# Blocks without a language are commands with what they print.
highlight_language = 'none'

# Docstrings say what types do not, and types stay in the signatures.
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False

# Every name that a docstring links has to be there.
nitpicky = True
nitpick_ignore = [('py:class', 'n_units')]  # a shape: (n_units,)

# Fonts are those of the reader's device: nothing is fetched from anywhere.
html_theme = 'furo'
html_title = 'mmprune'
html_show_copyright = False
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {'footer_icons': [], 'top_of_page_buttons': []}


def by_last_name(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """A docstring names what its own module imports (``PruneError``); the page has it by the name that
    a user imports it by. Taken where there is one of that last name alone."""
    python = env.get_domain('py')
    last = node.get('reftarget', '').rpartition('.')[2]
    found = [
        name
        for name, entry in python.objects.items()
        if name.rpartition('.')[2] == last and not entry.aliased
    ]
    if node.get('refdomain') != 'py' or len(found) != 1:
        return None
    kind = python.role_for_objtype(python.objects[found[0]].objtype)
    return python.resolve_xref(env, node['refdoc'], app.builder, kind, found[0], node, shown)


def setup(app: Any) -> None:
    app.connect('missing-reference', by_last_name)
