"""The templates of the pages, with the style and the script that every page holds.

`page` and `comparison_page` fill them. Whatever comes from data is escaped; the page's
policy runs its own script, known by its hash, and no other.
"""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

_FOLDER = Path(__file__).parent


@functools.cache
def templates() -> jinja2.Environment:
    """Returns the templates of the pages, which escape what they are given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # What `tojson` writes into a page: no spaces, and the order it was given in.
    environment.policies["json.dumps_kwargs"] = {
        "separators": (",", ":"),
        "allow_nan": False,
    }
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals["script"] = Markup(script)
    environment.globals["script_hash"] = f"sha256-{digest}"
    return environment
