"""Formulas as MathML, which browsers draw by themselves: no script, no font and nothing from the network."""
import re
from html import unescape

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.S)
KNOWN = {r"\\lVert|\\rVert|\\\|": "‖", r"(\\\\)\[[^\]]*\]": r"\1"}  # what latex2mathml does not know → what it knows: norms, the space after a row


def mathml(latex: str, *, block: bool) -> str:
    "A formula in LaTeX as MathML; an error where a part of it is not understood."
    for unknown, known in KNOWN.items(): latex = re.sub(unknown, known, latex)
    found = convert(latex, display="block" if block else "inline")
    odd = re.findall(r">([^<]*\\[^<]*)<", found)
    if odd: raise ValueError(f"{', '.join(odd)} in the formula {latex!r} is not understood by latex2mathml")
    return found


def drawn(html: str) -> str:
    "A page with its formulas as MathML."
    return FORMULA.sub(lambda f: mathml(unescape(f[2] or f[3] or "").strip(), block=f[1] == "div"), html)
