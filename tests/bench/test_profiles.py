"""Time is attributed to whom it belongs; ways that are compared compute the same."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fsar.core.basics import torch_seed
from fsar.bench.growth import QUICK, growth, noise_batch
from fsar.model.cost import Task
from fsar.methods.trx import TupleAttention
from fsar.model.blocks import by_class, class_slots
from fsar.model.base import METHODS
from fsar.model.registry import create_model
from fsar.bench.profiles import ENGINE, GROUPS, SEGMENTS, attributed, backbone_named, findings, profile_step, segment, shares, slots_of, training_step, tuples_made
from fsar.bench.timing import profiling

methods = pytest.mark.parametrize("method", sorted(METHODS))
TASK = Task(frames=4, ways=2)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@methods
def test_gradients_belong_to_who_made_the_forward_operators(method):
    "As many gradients of convolutions are the backbone's as a bare backbone has, and none of its is missing."
    model = create_model(method, backbone="resnet_micro", frames=TASK.frames, classes=8)
    with profiling() as profiler, backbone_named(model): training_step(model, noise_batch(model, TASK, 32))()
    found = [(phase, part) for phase, part, e in attributed(profiler.events()) if e.name == ENGINE + "ConvolutionBackward0"]
    assert found.count(("backward", "backbone")) == sum(isinstance(m, nn.Conv2d) for m in model.backbone.modules())
    named = [e for e in profiler.events() if e.name == ENGINE + "ConvolutionBackward0"]
    assert len(found) == len(named)                                                  # each once
    assert not model.backbone._forward_hooks and not model.backbone._forward_pre_hooks


@methods
def test_a_profile_leaves_nothing_out(method):
    table = profile_step(method, TASK, backbone="resnet_micro", size=32, steps=1)
    assert {(p, q) for p, q in zip(table["phase"], table["part"])} == {("forward", "method"), ("forward", "backbone"), ("backward", "method"), ("backward", "backbone"), ("optimiser", "optimiser")}
    assert (table["seconds"] >= 0).all() and shares(table).sum(axis=1).iloc[0] == pytest.approx(1)


def test_an_engine_with_a_thread_of_its_own_is_followed():
    "As on a GPU: functions of the backward pass lie in no range, and kernels are events of another device."
    cpu, gpu = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    def event(name, start, parent=None, number=-1, device=cpu):
        e = SimpleNamespace(name=name, sequence_nr=number, cpu_parent=parent, cpu_children=[], time_range=SimpleNamespace(start=start), device_type=device)
        if parent is not None: parent.cpu_children.append(e)
        return e
    forward = event("fsar::forward", 0)
    backbone = event("fsar::backbone", 1, forward)
    events = [forward, backbone, event("aten::conv2d", 2, backbone, 7), event("aten::mul", 3, backbone, 8), event("aten::add", 4, forward, 8),  # mul made no function: 8 is add's
              event("fsar::backward", 5), event("fsar::optimiser", 9), event("fsar::forward", 0, device=gpu), event("kernel", 6, device=gpu)]
    functions = [event(ENGINE + "AddBackward0", 6, number=8), event(ENGINE + "ConvolutionBackward0", 7, number=7), event(ENGINE + "torch::autograd::AccumulateGrad", 8)]
    events += [*functions, event("aten::convolution_backward", 7, functions[1])]
    found = {e.name: (phase, part) for phase, part, e in attributed(events)}
    assert found[ENGINE + "AddBackward0"] == ("backward", "method") and found["aten::convolution_backward"] == ("backward", "backbone")
    assert found[ENGINE + "torch::autograd::AccumulateGrad"] == ("backward", "backbone") and "kernel" not in found and len(found) == 11


def test_every_group_has_a_segment():
    for part in ("backbone", "method", "optimiser"):
        assert all(segment(part, group) in SEGMENTS for group in (*GROUPS, "element by element"))


def test_tuples_made_give_the_same_distances_with_unequal_shots():
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    for cardinality in (2, 3):
        with torch_seed(3): head, shown, asked = TupleAttention(12, cardinality, width=20).double(), torch.randn(6, 5, 12).double(), torch.randn(4, 5, 12).double()
        with torch.no_grad():
            head.norm.weight.uniform_(0.5, 2); head.norm.bias.uniform_(-1, 1)
            slots, real = class_slots(labels, 3)
            old = tuples_made(head, slots_of(head, asked), tuple(by_class(x, slots) for x in slots_of(head, shown)), real)
            new = head.distance(head.project(asked), {k: by_class(x, slots) for k, x in head.project(shown).items()}, real)
        assert torch.allclose(old, new, rtol=1e-9)


@on_gpu
def test_on_a_gpu():
    table = profile_step("molo", TASK, backbone="resnet_micro", size=32, device="cuda", precision="bf16")
    assert {"forward", "backward", "optimiser"} == set(table["phase"]) and table["seconds"].sum() > 0
    assert table[(table["part"] == "backbone") & (table["phase"] == "backward")]["seconds"].sum() > 0
    found = growth(["otam", "trx", "vim"], QUICK, device="cuda")
    assert (found["seconds"] > 0).all() and (found["bytes"] >= 0).all()
    assert len(findings(device="cuda")) == 2
