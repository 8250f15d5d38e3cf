"""A page in one HTML file: all text escaped, all pictures inside, nothing asked of any server."""

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from bit_ray.plots.lines import plain

_QUALITY = 85


def render_page(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: Path of a Jinja template below the package, such as ``studies/report.html.jinja``; it extends
            ``plots/page.html.jinja``.
        values: What it shows; texts are escaped, and control characters in them are replaced.
    """
    environment = Environment(
        loader=PackageLoader("bit_ray", ""),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


@contextmanager
def steady_style(name: str) -> Iterator[None]:
    """Make matplotlib draw the same bytes on every machine, and not warn of letters that its font lacks.

    Its global settings are changed, so this is not for several threads at once.

    Args:
        name: Of the one figure that is drawn.
    """
    # A user's own settings of matplotlib would give other bytes.
    settings = style.context(["default", {"svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name}])
    with settings, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(figure: Figure, name: str, title: str) -> Markup:
    """Return a figure, made and drawn within `steady_style`, as SVG for a page of several.

    Args:
        figure: It.
        name: Another for each figure of the page: small letters, digits and hyphens.
        title: What one sees, for those who do not see it.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    content = drawn.getvalue()
    # Groups have the same names in every plot, but must differ on one page; "<" in texts is escaped already.
    content = content[content.index("<svg ") :].replace('<g id="', f'<g id="{name}-')
    described = f'<title id="{name}_title">{escape(plain(title))}</title>'
    return Markup(content.replace(">", f' role="img" aria-labelledby="{name}_title">{described}', 1))


def fitted(picture: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Return a picture ``[H, W, 3] uint8`` at most ``side`` pixels wide and high.

    One that is smaller is enlarged by a whole factor, so that its pixels stay squares.
    """
    image = Image.fromarray(picture)
    if (factor := side // max(image.size)) > 1:
        image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    return np.array(image)


def data_uri(picture: npt.NDArray[np.uint8]) -> str:
    """Return a picture ``[H, W, 3] uint8`` as the URI of a JPEG that is inside the page."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
