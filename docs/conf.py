"""Sphinx configuration of the documentation."""

import os
import shutil
from importlib.metadata import version as version_of
from os.path import relpath
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.inspect import TypeAliasForwardRef

project = "SpaPerb"
author = "The SpaPerb developers"
project_copyright = author
version = release = version_of("spaperb")

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax as a file of the site, so that formulas need no network
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]

nitpicky = True
# Names of other packages are links where their inventories can be fetched, and plain text where
# a build has no network.
if os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        name: (f"https://{address}/", None)
        for name, address in {
            "anndata": "anndata.readthedocs.io/en/stable",
            "lightning": "lightning.ai/docs/pytorch/stable",
            "matplotlib": "matplotlib.org/stable",
            "numpy": "numpy.org/doc/stable",
            "pandas": "pandas.pydata.org/docs",
            "python": "docs.python.org/3",
            "scanpy": "scanpy.readthedocs.io/en/stable",
            "scipy": "docs.scipy.org/doc/scipy",
            "scvi-tools": "docs.scvi-tools.org/en/stable",
            "sklearn": "scikit-learn.org/stable",
            "torch": "docs.pytorch.org/docs/stable",
        }.items()
    }
packages = (
    "anndata collections dask lightning matplotlib np npt numpy pandas pathlib scanpy scipy scvi "
    "sklearn torch"
)
nitpick_ignore_regex = [
    # Where a package keeps a name that it exports.
    ("py:class", r"spaperb\.\w+\._\w+\.\w+"),
    ("py:.*", rf"({packages.replace(' ', '|')})\..*"),
    (
        "py:class",
        "AnnOrMuData|FloatArray|How|IntArray|Part|Predicted|Ranks|Tensors|"
        r"pd.(Categorical|DataFrame|Index|Series)|sparse.csr_matrix",
    ),  # fields of named tuples, whose types autodoc leaves unread, and a type of scvi-tools
]

# Notebooks are committed with their outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath", "html_image"]
myst_heading_anchors = 4

autosummary_generate = True
# Names that a room gives from its files are documented with the room.
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Names as users write them, instead of where a package keeps them; "~" shows the last part.
autodoc_type_aliases = {
    "AnnData": "~anndata.AnnData",
    "Axes": "~matplotlib.axes.Axes",
    "Expression": "Expression",
    "FloatArray": "~numpy.ndarray",
    "IntArray": "~numpy.ndarray",
    "dask.array.Array": "dask.array.Array",
    "np.ndarray": "~numpy.ndarray",
    "npt.NDArray": "~numpy.ndarray",
    "pd.DataFrame": "~pandas.DataFrame",
    "pd.Series": "~pandas.Series",
    "torch.Tensor": "~torch.Tensor",
}
# Sphinx 9.0 shows an alias inside of another type (`X | None`) by its representation, and takes
# no `NDArray[float]`.
TypeAliasForwardRef.__repr__ = lambda self: self.name
TypeAliasForwardRef.__getitem__ = lambda self, item: self
toc_object_entries_show_parents = "hide"
highlight_language = "none"
python_maximum_signature_line_length = 88
numpydoc_show_class_members = False

html_theme = "sphinx_book_theme"
html_title = "SpaPerb"
html_context = {"default_mode": "auto"}
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "show_toc_level": 2,
    "use_fullscreen_button": False,
}

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = [path.stem for path in TUTORIALS.glob("*.ipynb")]

# Markdown outside of docs/ is shown by the page that includes it, a notebook by its copy.
PAGES = {
    "../README": "index",
    "../CHANGELOG": "changelog",
    "../CONTRIBUTING": "contributing",
    "../pretraining/README": "pretraining",
    "../benchmarks/accuracy/README": "accuracy",
    "../benchmarks/speed/README": "speed",
    "../benchmarks/reliability/README": "reliability",
    "../tutorials/README": "tutorials",
    **{f"../tutorials/{name}": f"tutorials/{name}" for name in NOTEBOOKS},
}


def copy_notebooks(app: Sphinx, config: Config) -> None:
    """Copy the notebooks to where Sphinx finds them, with links that are right from there."""
    folder = Path(app.srcdir) / "tutorials"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in NOTEBOOKS:
        text = (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
        text = text.replace("](../", "](../../")
        (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")


def lead_to_page(app: Sphinx, doctree: nodes.document) -> None:
    """Let links that are right on GitHub, to files outside of docs/, lead to their pages."""
    for link in doctree.findall(pending_xref):
        if link["refdomain"] == "doc":
            target = relpath(link["reftarget"], app.srcdir)
            link["reftarget"] = PAGES.get(target, link["reftarget"])


def skip_field(app: Sphinx, what: str, name: str, obj: object, *args: object) -> bool | None:
    """Leave out the fields of named tuples: the docstring of the tuple tells more."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> None:
    """Connect to Sphinx."""
    app.connect("config-inited", copy_notebooks)
    app.connect("doctree-read", lead_to_page)
    app.connect("autodoc-skip-member", skip_field)
