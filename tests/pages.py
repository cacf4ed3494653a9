"""What a person sees on a page that a tool wrote."""

import base64
import re
import shutil

NAMES_OF_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES_OF_CHROMIUM)), None)


def type_sizes(html: str) -> set[float]:
    """The sizes of the type in a page's drawings, as shares of the width that all are scaled to."""
    sizes = set()
    svg = r'<svg[^>]* viewBox="0 0 ([\d.]+) [\d.]+"(.*?)</svg>'
    for width, drawing in re.findall(svg, html, re.DOTALL):
        found = re.findall(r"font-size: ([\d.]+)px", drawing)
        assert len(found) == drawing.count("<text") > 0
        sizes |= {round(float(size) / float(width), 6) for size in found}
    return sizes


def images(html: str) -> list[str]:
    """The alternative texts of a page's images, each of which must be a PNG."""
    found = re.findall(r"<img alt='([^']*)' src='data:image/png;base64,([^']*)'>", html)
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for _, data in found)
    return [alternative for alternative, _ in found]
