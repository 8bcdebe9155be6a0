"Checkpoints: what is saved comes back, damage is named, and no kill, full disk or locked folder leaves a half-written one."
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from disks import small_disk
from fsar.engine.checkpoints import (CheckpointWarning, atomic_folder, load_model, newest_sound, optimizer_tensors, read_state, restore_state, save_model, save_state,
                              tensor_bytes, verified_record)
from fsar.core.basics import FsarError
from fsar.core.files import sha256_file, sha256_json
from fsar.model.base import METHODS as REGISTRY
from fsar.model.registry import create_model

METHODS = sorted(name for name, method in REGISTRY.items() if method.__module__.startswith("fsar."))


def small(method="protonet", seed=0, **kwargs):
    return create_model(method, **{"backbone": "resnet_micro", "frames": 4, "classes": 6, "seed": seed, **kwargs}).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("saved") / "best", small(), {"accuracy": 0.5})


@pytest.fixture
def checkpoint(saved, tmp_path):
    "A copy that a test may damage."
    import shutil
    return shutil.copytree(saved, tmp_path / "best")


# ---- what is saved comes back

@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_the_same(method, tmp_path):
    model = small(method, seed=3)
    save_model(tmp_path / "one", model, {"classes": ["a", "ß"]})
    again = load_model(tmp_path / "one", expect_method=method)
    clips = torch.randint(256, (3, model.clip_frames, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): before, after = model.embed(clips), again.embed(clips)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not again.training and again.config == model.config
    save_model(tmp_path / "two", again)
    assert sha256_file(tmp_path / "one/model.safetensors") == sha256_file(tmp_path / "two/model.safetensors")


def test_options_come_back(tmp_path):
    model = small("molo", options=["motion=false", "class_loss=0"])
    save_model(tmp_path / "m", model)
    assert load_model(tmp_path / "m").config == model.config


def test_loading_leaves_the_random_state_alone(saved):
    before = torch.random.get_rng_state()
    load_model(saved)
    assert torch.equal(before, torch.random.get_rng_state())


def test_bytes_depend_on_values_only():
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    wide = torch.zeros(6, 10, 3, 3)
    wide[:, ::2] = x
    same = [x, x.to(memory_format=torch.channels_last), wide[:, ::2], x.clone().requires_grad_()]
    assert len({tensor_bytes({"a": y, "b": torch.tensor(1)}) for y in same}) == 1
    assert tensor_bytes({"a": x, "b": x}) == tensor_bytes({"b": x, "a": x})
    assert tensor_bytes({"a": x}) != tensor_bytes({"a": x + 1e-6})


# ---- damage

def damage_flip(folder): (folder / "model.safetensors").write_bytes(bytes(b ^ (i == 5000) for i, b in enumerate((folder / "model.safetensors").read_bytes())))
def damage_truncate(folder): os.truncate(folder / "model.safetensors", 1000)
def damage_empty(folder): (folder / "model.safetensors").write_bytes(b"")
def damage_remove(folder): (folder / "model.safetensors").unlink()
def damage_json(folder): (folder / "model.json").write_text('{"format": 1, "mod')
def damage_binary_json(folder): (folder / "model.json").write_bytes(bytes(range(256)))
def damage_edit(folder): (folder / "model.json").write_text((folder / "model.json").read_text().replace("0.5", "0.9"))
def damage_other_json(folder): (folder / "model.json").write_text('["nothing"]')
def damage_remove_json(folder): (folder / "model.json").unlink()


DAMAGES = [(damage_flip, "model.safetensors is damaged"), (damage_truncate, "model.safetensors is damaged"), (damage_empty, "model.safetensors is damaged"),
           (damage_remove, "model.safetensors is missing"), (damage_json, "model.json is not valid JSON"), (damage_binary_json, "model.json is not valid JSON"),
           (damage_edit, "model.json is damaged"), (damage_other_json, "is not the record of an fsar checkpoint"), (damage_remove_json, "no such file")]


@pytest.mark.parametrize("damage, words", DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_damage_is_named(checkpoint, damage, words):
    damage(checkpoint)
    with pytest.raises(FsarError) as caught: load_model(checkpoint)
    assert words in str(caught.value) and str(checkpoint) in str(caught.value)


@pytest.mark.parametrize("damage, words", DAMAGES, ids=[d.__name__ for d, _ in DAMAGES])
def test_the_previous_one_is_used_with_a_warning(tmp_path, damage, words):
    save_model(tmp_path / "best", small(seed=1), {"accuracy": 0.5})
    first = sha256_file(tmp_path / "best/model.safetensors")
    save_model(tmp_path / "best", small(seed=2), {"accuracy": 0.5})
    damage(tmp_path / "best")
    with pytest.warns(CheckpointWarning, match="the previous checkpoint is used instead") as caught: model = load_model(tmp_path / "best")
    assert words in str(caught[0].message) and "best.previous" in str(caught[0].message)
    save_model(tmp_path / "again", model)
    assert sha256_file(tmp_path / "again/model.safetensors") == first


def test_another_method(saved):
    with pytest.raises(FsarError, match=r"best holds a model of the method 'protonet', but 'molo' was asked for"): load_model(saved, expect_method="molo")


def test_nothing_there(tmp_path):
    with pytest.raises(FsarError, match="no usable checkpoint in .*nowhere"): load_model(tmp_path / "nowhere")


def reseal(folder, **changes):
    "Write the record again with true hashes, as a stranger could."
    record = json.loads((folder / "model.json").read_text())
    record.pop("sha256")
    record |= {"files": {"model.safetensors": sha256_file(folder / "model.safetensors")}, **changes}
    (folder / "model.json").write_text(json.dumps({**record, "sha256": sha256_json(record)}))


def test_a_pickle_is_never_loaded(checkpoint, tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "boom"),)
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    reseal(checkpoint)
    with pytest.raises(FsarError, match="is not a safetensors file"): load_model(checkpoint)
    assert not (tmp_path / "boom").exists()


def test_weights_that_do_not_fit(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(tensor_bytes({"other": torch.ones(2)}))
    reseal(checkpoint)
    with pytest.raises(FsarError, match=r"do not fit the model built from its model.json: \d+ tensors differ, first 'backbone"): load_model(checkpoint)


def test_a_newer_format(checkpoint):
    reseal(checkpoint, format=99, fsar="9.9")
    with pytest.raises(FsarError, match="newer than this one .*upgrade fsar"): load_model(checkpoint)


# ---- disks

def test_full_disk(tmp_path):
    "2.4 MB each: there is room for a second checkpoint, but not with the filler."
    with small_disk(tmp_path / "disk", "size=6m") as disk:
        save_model(disk / "best", small(seed=1))
        before = sha256_file(disk / "best/model.safetensors")
        (disk / "filler").write_bytes(b"x" * (2 * 2**20))
        with pytest.raises(FsarError, match=r"cannot write .*best: no space left on the disk"): save_model(disk / "best", small("molo"))
        assert sorted(p.name for p in disk.iterdir()) == ["best", "filler"] and sha256_file(disk / "best/model.safetensors") == before
        (disk / "filler").unlink()
        save_model(disk / "best", small(seed=2))  # room again
        assert load_model(disk / "best")


def test_file_size_limit(tmp_path):
    "The same without mounting: the kernel refuses to let a file grow."
    save_model(tmp_path / "best", small(seed=1))
    before, limits = sha256_file(tmp_path / "best/model.safetensors"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(FsarError, match=r"cannot write .*best: the file grows beyond the allowed size"): save_model(tmp_path / "best", small(seed=2))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["best"] and sha256_file(tmp_path / "best/model.safetensors") == before


def test_read_only_folder(tmp_path):
    with small_disk(tmp_path / "disk", "size=3m") as disk:
        save_model(disk / "best", small())
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(FsarError, match=r"cannot write .*best: the file system is read-only"): save_model(disk / "best", small(seed=2))
        assert load_model(disk / "best")


def test_no_permission(tmp_path):
    if os.geteuid() == 0: pytest.skip("root may write everywhere; test_read_only_folder covers it")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FsarError, match=r"cannot write .*best: permission denied"): save_model(tmp_path / "locked/best", small())


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(FsarError, match=r"cannot write .*runs/best"): save_model(tmp_path / "runs/best", small())


# ---- kills

SIZES = {name: {"w": torch.full((50,), value)} for name, value in (("old", 1.0), ("new", 2.0))}


def write(folder, which):
    from fsar.engine.checkpoints import WEIGHTS, _write
    _write(folder, {WEIGHTS: SIZES[which]}, {"which": which})


FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod", "tempfile.mkstemp"}


def killed_while_saving(folder, count):
    "Save a checkpoint, but end by SIGKILL right before file operation number `count` of it."
    left = iter(range(count))

    def watch(event, args):
        if event in FILE_OPERATIONS and next(left, None) is None: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    write(folder, "new")


@pytest.mark.parametrize("second", [False, True], ids=["over the first", "over a second"])
def test_killed_at_every_file_operation(tmp_path, second):
    "Whichever operation is the last, a sound checkpoint can be read, and saving again works."
    context, seen = multiprocessing.get_context("fork"), []
    for count in range(200):
        folder = tmp_path / str(count) / "last"
        for _ in range(1 + second): write(folder, "old")
        child = context.Process(target=killed_while_saving, args=(folder, count))
        child.start(); child.join()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            seen.append(newest_sound(folder)[1]["which"])
        write(folder, "new")
        assert verified_record(folder)["which"] == "new"
        if child.exitcode == 0: break
        assert child.exitcode == -signal.SIGKILL
    assert len(seen) > 8 and seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)  # old … old new … new


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError, FsarError])
def test_an_interruption_while_writing_changes_nothing(tmp_path, problem):
    write(tmp_path / "x", "old")
    with pytest.raises(problem), atomic_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("…")
        raise problem("stop")
    assert os.listdir(tmp_path) == ["x"] and verified_record(tmp_path / "x")["which"] == "old"


# ---- training states

def trained(steps, optimizer):
    "A model after a few steps, with an optimiser that has a memory."
    model = small().train()
    model.backbone.to(memory_format=torch.channels_last)
    optimizer = optimizer(model)
    for _ in range(steps): step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    clips = torch.randint(256, (4, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    optimizer.zero_grad()
    model.embed(clips)["frames"].square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)],
                         ids=["adam", "adamw", "sgd", "momentum"])
def test_an_optimiser_goes_on_as_if_nothing_happened(tmp_path, make):
    straight, _ = trained(4, lambda m: make(m.parameters()))
    model, optimizer = trained(2, lambda m: make(m.parameters()))
    save_state(tmp_path / "last", model, optimizer, {"step": 2})
    model, optimizer = trained(0, lambda m: make(m.parameters()))
    place, record = read_state(tmp_path / "last")
    restore_state(place, model, optimizer)
    for _ in range(2): step(model, optimizer)
    assert record["training"] == {"step": 2} and tensor_bytes(model.state_dict()) == tensor_bytes(straight.state_dict())


def test_scalar_parameters_and_the_step_count_are_not_confused():
    scale = torch.nn.Parameter(torch.tensor(2.0))
    one, two = torch.optim.Adam([scale]), torch.optim.Adam([scale])
    scale.grad = torch.tensor(1.0)
    one.step()
    from fsar.engine.checkpoints import restore_optimizer
    restore_optimizer(two, optimizer_tensors(one))
    assert all(torch.equal(two.state[scale][k], one.state[scale][k]) for k in ("step", "exp_avg", "exp_avg_sq"))


def test_a_damaged_state_is_set_aside_and_its_predecessor_survives(tmp_path):
    model, optimizer = trained(1, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    for number in (1, 2): save_state(tmp_path / "last", model, optimizer, {"step": number})
    damage_truncate(tmp_path / "last")
    with pytest.warns(CheckpointWarning): place, record = read_state(tmp_path / "last", set_aside=True)
    assert record["training"]["step"] == 1 and place.name == "last.previous"
    assert sorted(os.listdir(tmp_path)) == ["last.damaged", "last.previous"]
    save_state(tmp_path / "last", model, optimizer, {"step": 3})
    assert verified_record(tmp_path / "last.previous")["training"]["step"] == 1


def test_no_state_yet(tmp_path): assert read_state(tmp_path / "last") is None


def test_a_model_is_not_a_state(saved):
    with pytest.raises(FsarError, match="holds a model but no training state"): read_state(saved)
