"""Components of other packages: found by their entry points, never in place of ours, never a reason for a list to fail."""
import subprocess
import sys
from pathlib import Path

import pytest

from fsar.core.basics import FsarError
from fsar.core.plugins import OpenRegistry

METHOD = """
import torch
from fsar.model.base import FewShotModel
from fsar.model.blocks import class_mean

class Mine(FewShotModel):
    "Nearest prototype."
    def score(self, support, labels, query, ways):
        return -torch.cdist(query["frames"].mean(-2), class_mean(support["frames"].mean(-2), labels, ways))
"""


def install(folder: Path, package: str, points: str, **modules: str) -> None:
    "Write a package and the entry points that an installer would write next to it."
    (folder / package).mkdir(parents=True)
    for name, text in {"__init__": "", **modules}.items(): (folder / package / f"{name}.py").write_text(text)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def open_registry(tmp_path, monkeypatch):
    "A registry of matchers as a new process has it."
    monkeypatch.syspath_prepend(tmp_path)
    return OpenRegistry("matcher", own="fsar.model.matching")


def test_a_plugin_is_found_by_name_and_in_the_list(tmp_path, open_registry):
    install(tmp_path, "plug_good", "[fsar.matchers]\nlast = plug_good.one:last\n", one="def last(sim): return sim")
    assert "last" in open_registry and "plug_good.one" not in sys.modules                # found without being imported
    assert open_registry["last"].__module__ == "plug_good.one" and "last" in list(open_registry) and len(open_registry) == 1
    with pytest.raises(FsarError, match="unknown matcher 'lost'. Did you mean 'last'"): open_registry["lost"]
    assert open_registry.get("lost") is None


def test_a_broken_plugin_is_an_error_by_name_and_a_warning_in_a_list(tmp_path, open_registry):
    install(tmp_path, "plug_broken", "[fsar.matchers]\nbroken = plug_broken.one:match\nabsent = plug_broken:nothing\n", one="import no_such_library")
    with pytest.raises(FsarError, match="cannot load the matcher 'broken' of the package plug_broken: .*no_such_library.*entry point broken = 'plug_broken.one:match'"):
        open_registry["broken"]
    with pytest.warns(UserWarning, match="cannot load the matcher 'absent' of the package plug_broken"): assert list(open_registry) == []


def test_two_packages_with_one_name(tmp_path, open_registry):
    for package in ("plug_one", "plug_two"): install(tmp_path, package, f"[fsar.matchers]\nsame = {package}.m:f\n", m="def f(sim): return sim")
    with pytest.raises(FsarError, match="several packages offer a matcher 'same': plug_one, plug_two|plug_two, plug_one"): open_registry["same"]
    with pytest.warns(UserWarning, match="offers a matcher 'same', but this name is taken"): assert "same" not in list(open_registry)


def test_a_method_of_another_package_is_a_method_and_ours_keep_their_names(tmp_path):
    install(tmp_path, "plug_methods", "[fsar.methods]\nmine = plug_methods.m:Mine\notam = plug_methods.m:Mine\n", m=METHOD)
    program = ("import warnings; warnings.simplefilter('error'); from fsar.model.registry import METHODS, create_model\n"
               "model = create_model('mine', backbone='resnet_micro')\n"
               "assert type(model).__module__ == 'plug_methods.m' and METHODS['otam'].__module__ == 'fsar.methods.otam'\n"
               "try: list(METHODS)\n"
               "except UserWarning as w: print(w)\n"
               "try: METHODS.register('otam')(type(model))\n"
               "except Exception as e: print(e)\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "PATH": "", "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True).stdout
    assert "plug_methods offers a method 'otam', but this name is taken" in said and "method 'otam' is registered already" in said
