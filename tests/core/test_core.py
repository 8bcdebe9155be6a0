"""Errors, registries, keyed randomness, files that are whole or absent."""
import os
import pkgutil
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fsar.core
from fsar.core import basics as core, files, machine
from fsar.core.config import Config
from fsar.core.basics import FsarError


def test_generators_are_pure_functions_of_their_key():
    assert np.array_equal(core.generator(1, 2).random(5), core.generator(1, 2).random(5))
    firsts = {core.generator(seed, index).random() for seed in range(10) for index in range(10)}
    assert len(firsts) == 100


def test_torch_seed_leaves_no_trace_even_when_the_body_fails():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), core.torch_seed(1):
        torch.rand(3)
        raise ZeroDivisionError
    assert torch.equal(before, torch.get_rng_state())


def test_importing_and_building_leaves_the_global_generators_alone():
    code = ("import torch, numpy, random; a = (torch.get_rng_state().clone(), numpy.random.get_state()[1].copy(), random.getstate());"
            "from fsar.model.registry import create_model; m = create_model('molo', backbone='resnet_micro');"
            "assert torch.equal(a[0], torch.get_rng_state()) and (a[1] == numpy.random.get_state()[1]).all() and a[2] == random.getstate()")
    subprocess.run([sys.executable, "-c", code], check=True)


WITHOUT_TORCH = {"core": sorted(module.name for module in pkgutil.iter_modules(fsar.core.__path__)), "data": ["archives", "sources", "splits"]}


@pytest.mark.parametrize("wing", WITHOUT_TORCH)
def test_a_module_is_imported_without_torch(wing):
    code = ("import importlib, sys\n"
            "for name in sys.argv[1:]:\n"
            "    importlib.import_module(name)\n"
            "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')")
    names = [f"fsar.{wing}.{module}" for module in WITHOUT_TORCH[wing]]
    assert len(names) >= 3
    found = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is a Linux device")
def test_full_disk_is_named():
    with pytest.raises(FsarError, match="cannot write /dev/full: no space left on the disk"), files.writing("/dev/full"):
        with open("/dev/full", "w") as f: f.write("x" * 100_000)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError): files.write_json(tmp_path / "a.json", float("nan"))
    assert files.read_json(tmp_path / "a.json") == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_registry_refuses_a_taken_name():
    registry = core.Registry("thing")
    registry.register("a")(len)
    with pytest.raises(FsarError, match="thing 'a' is registered already"): registry.register("a")(max)
    with pytest.raises(FsarError, match="unknown thing 'b'"): registry["b"]
    assert registry.get("b") is None


@pytest.mark.parametrize("key, value, message", [
    ("metod", "molo", "unknown configuration key 'metod'. Did you mean 'method'?"),
    ("episodes", 2.5, "'episodes' must be a whole number, got 2.5"),
    ("flip", 1, "'flip' must be true or false, got 1"),
    ("options", "a=b", "'options' must be a list of texts, got 'a=b'"),
    ("precision", "fp8", "'precision' must be one of 'auto', 'fp32', 'bf16', got 'fp8'"),
    ("shots", 0, "'shots' must be at least 1, got 0"),
    ("test_shots", [], "'test_shots' must be one or more"),
    ("lr", float("nan"), "'lr' must be between"),
])
def test_configuration_errors_name_the_key(key, value, message):
    with pytest.raises(FsarError) as error: Config.from_dict({key: value})
    assert message in str(error.value)


def test_configuration_survives_json_and_hashes_only_what_counts():
    c = Config(method="otam", options=("lam=0.2",), lr=1)
    assert Config.from_dict(c.to_dict()) == c and isinstance(c.lr, float)
    assert c.hash == c.replace(out="x", workers=2, store="y").hash != c.replace(size=48).hash


FAULTS = """
import resource, sys, threading, torch
from fsar.core.machine import keep_freed_memory
kept = keep_freed_memory(scarce=sys.argv[2] == "scarce")
keep_freed_memory()  # said once, scarce stays
def step(): [torch.zeros(size, dtype=torch.uint8) for size in (40_000_000, 20_000_000, 2_000_000)]
def measure():
    for _ in range(4): step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): step()
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[1] == "main": measure()
else: (thread := threading.Thread(target=measure)).start(); thread.join()
"""


def faults(setting, where="main", word=""):
    "Whether freed memory is kept, and the page faults of five steps that take and free 62 MB each, in a process of its own."
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))} | {"FSAR_KEEP_MEMORY": setting}
    kept, count = subprocess.run([sys.executable, "-c", FAULTS, where, word], env=env, check=True, capture_output=True, text=True).stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large buffers back at once")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_kept_and_not_taken_anew_page_by_page(where):
    (off, usual), (on, kept) = faults("0", where), faults("", where)
    assert (off, on) == (False, True) and usual > 100 and kept < usual / 2  # a kernel that reclaims idle pages takes some of the kept ones; 75,000 pages of 4 kB, or 150 of 2 MB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large buffers back at once")
def test_where_memory_is_scarce_it_is_given_back_for_good_unless_the_user_says_otherwise():
    (off, usual), (on, kept) = faults("", word="scarce"), faults("1", word="scarce")
    assert (off, on) == (False, True) and usual > 100 and kept < usual / 2  # as above


@pytest.mark.parametrize("library", [OSError("no such library"), TypeError("Windows"), SimpleNamespace()])
def test_memory_is_kept_only_where_glibc_is(library, monkeypatch):
    def load(name):
        if isinstance(library, Exception): raise library
        return library
    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    assert machine._glibc.__wrapped__() is None
    monkeypatch.setattr(machine, "_glibc", lambda: None)
    monkeypatch.setattr(machine, "_asked_to_save", [])  # a test before this one may have trained a large model
    assert machine.keep_freed_memory() is machine.keep_freed_memory(scarce=True) is False and not machine._asked_to_save
