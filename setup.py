"""Build script: every value comes from settings.ini, the one place where the metadata stands."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
readme = HERE / "README.md"

# Two folders outside the package travel inside it: the split lists and the papermill templates.
carried = {"fsar.data_splits": "data_splits", "fsar.templates": "nbs/templates"}
carried_data = {"fsar.data_splits": ["*.md", "SHA256SUMS", "*/*.csv"], "fsar.templates": ["*.ipynb", "*.csv"]}

extras = {name: cfg[f"{name}_requirements"].split() for name in ("cluster", "hub", "web", "interactive", "docs", "dev")}
extras["dev"] = sorted({requirement for extra in extras.values() for requirement in extra})  # what the tests need: everything

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: " + cfg["audience"],
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split() + cfg["conditional_requirements"].strip().splitlines(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    packages=find_packages(include=["fsar", "fsar.*"]) + list(carried),
    package_dir=carried,
    package_data={"fsar": ["py.typed", "predict/models/*/*"], **carried_data},
    zip_safe=False,
)
