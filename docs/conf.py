"""How the documents are built: ``make docs``, or ``sphinx-build -W docs docs/_build/html``.

Nothing is fetched. Pages with code run it; the tour needs SmolLM2, so it is run only where that is
unpacked already, and shown without outputs elsewhere (or with ``TVLENS_DOCS_TOUR=0``). The gallery
draws results that are kept beside it; ``gallery/make.py`` makes them.
"""

import os
import shutil
import sys
from pathlib import Path

import tvlens
from tvlens import list_models

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
# Sphinx reads no page outside its own folder.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)

project = "tvlens"
author = "The tvlens developers"
copyright = f"2026, {author}"
version = release = tvlens.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "backlinks",
    "figures",
    "gallery",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]

# Pages
html_theme = "furo"
html_title = "tvlens"
html_static_path = ["_static"]
html_css_files = ["tvlens.css"]
html_theme_options = {
    "source_repository": "https://github.com/tvlens/tvlens/",
    "source_directory": "docs/",
}
copybutton_exclude = ".linenos, .gp, .go"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Code that is run. Stale figures are worse than slow builds, so nothing is cached.
# The default renderer's type is unknown to MyST-NB, which would drop every figure.
os.environ.setdefault("PLOTLY_RENDERER", "notebook_connected")
os.environ.setdefault("TQDM_DISABLE", "1")
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"
_run_tour = (
    os.environ.get("TVLENS_DOCS_TOUR", "1") != "0" and list_models()["cached"]["smollm2-135m"]
)
nb_execution_excludepatterns = [] if _run_tour else ["notebooks/*"]

# Reference
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Shapes stand in the signature; between asterisks, docutils would read them as emphasis.
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 80


def setup(app):
    """Sphinx cannot read the default of a dataclass field that is made by a function."""

    def readable(app, what, name, obj, options, signature, returns):
        return signature and signature.replace("<factory>", "..."), returns

    app.connect("autodoc-process-signature", readable)
