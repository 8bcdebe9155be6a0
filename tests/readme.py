"""README.md is nbs/index.ipynb, converted: `python tests/readme.py` writes it. The notebook's links are relative to nbs/, the README's to the top folder."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).parent.parent


def readme() -> str:
    "The text of README.md: the index notebook with its stored outputs, inputs tagged hide-input left out."
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}},
                     "MarkdownExporter": {"preprocessors": ["nbconvert.preprocessors.TagRemovePreprocessor"]}})
    text, _ = MarkdownExporter(config=config).from_notebook_node(nbformat.read(ROOT / "nbs" / "index.ipynb", 4))
    text = re.sub(r"\]\((?![a-z]+:|#|\.\./)", "](nbs/", text).replace("](../", "](")
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]  # no runs of blank lines
    return "\n".join(kept).strip() + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
