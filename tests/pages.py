"""What a person sees of a page that a tool wrote."""

import re


def type_sizes(html: str) -> set[float]:
    """The sizes of the type in a page's drawings, as shares of the width that all are scaled to."""
    sizes = set()
    for width, drawing in re.findall(
        r'<svg[^>]* viewBox="0 0 ([\d.]+) [\d.]+"(.*?)</svg>', html, re.DOTALL
    ):
        found = re.findall(r"font-size: ([\d.]+)px", drawing)
        assert len(found) == drawing.count("<text") > 0
        sizes |= {round(float(size) / float(width), 6) for size in found}
    return sizes
