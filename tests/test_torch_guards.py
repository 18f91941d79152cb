"""The signature of torch tensors that were seen before: equal facts, or facts read again."""

from __future__ import annotations

import pytest
from support.problems import make_problem

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from support.every_framework import put

from flashmla_cupy import flash_mla_with_kvcache, get_mla_metadata
from flashmla_cupy.errors import OptionError, ShapeError, StaleMetadataError
from flashmla_cupy.frameworks import torch_guards, torch_tensors

CALLS = {0: "lazy", 1: "metadata", 7: "outputs"}


def arguments_of(kind: int, seed: int = 0, lengths=(70, 5)):
    """The eight arrays of a call, None where it lacks one."""
    arrays = [put("torch", x, -1) for x in make_problem(lengths, h_q=4, seed=seed).arrays()]
    metadata = get_mla_metadata(arrays[3], 4, 1) if kind else (None, None)
    outputs = (None, None)
    if kind == 7:
        outputs = torch.empty(len(lengths), 1, 4, 512, dtype=arrays[0].dtype), torch.empty(2, 4, 1)
    return [*arrays, *metadata, *outputs]


def signature(adapter, arrays):
    """Of the arrays of a call, which end with the last one that it has."""
    arrays = tuple(arrays)
    while arrays[-1] is None:
        arrays = arrays[:-1]
    return adapter.signature(arrays)


@pytest.fixture
def adapter():
    """With nothing remembered yet."""
    made = torch_tensors.Torch()
    if made._guards._make is None:
        pytest.skip("this PyTorch has no TensorGuards")
    return made


@pytest.fixture
def made(adapter, monkeypatch):
    """How many guards were made."""
    made, make = [], adapter._guards._make
    monkeypatch.setattr(adapter._guards, "_make", lambda *a, **b: made.append(a) or make(*a, **b))
    return made


@pytest.mark.parametrize("kind", CALLS, ids=CALLS.values())
def test_the_third_call_reads_no_facts(adapter, kind, monkeypatch):
    signatures = [signature(adapter, arguments_of(kind, seed)) for seed in range(2)]
    assert signatures[0][0] == signatures[1][0]
    monkeypatch.setattr(torch_tensors, "Facts", None)  # would be called for facts that are read
    arrays = arguments_of(kind, 2)
    facts, addresses = signature(adapter, arrays)
    assert facts is signatures[0][0]
    assert addresses == tuple(x.data_ptr() for x in arrays if x is not None)


CHANGES = {
    "shape": lambda a: arguments_of(1, lengths=(70, 5, 64)),
    "stride of q": lambda a: [torch.cat([a[0], a[0]], 2)[:, :, ::2], *a[1:]],
    "stride of the cache": lambda a: [a[0], torch.cat([a[1], a[1]], 3)[..., :576], *a[2:]],
    "dtype of q": lambda a: [a[0].half(), *a[1:]],
    "dtype of the lengths": lambda a: [*a[:3], a[3].long(), *a[4:]],
    "other metadata": lambda a: [*a[:4], a[4][:-1], *a[5:]],
    "no metadata": lambda a: [*a[:4], None, None, None, None],
    "outputs": lambda a: arguments_of(7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_facts_are_read(adapter, change):
    arrays = arguments_of(1)
    before = [signature(adapter, arrays)[0] for _ in range(3)]
    changed = CHANGES[change](arrays)
    found, _ = signature(adapter, changed)
    assert found != before[2]
    adapter._guards.found.clear()
    assert found == signature(adapter, changed)[0]
    assert signature(adapter, arrays)[0] == before[0]


def test_a_tensor_changed_in_place_is_noticed(adapter):
    arrays = arguments_of(1)
    before = [signature(adapter, arrays)[0] for _ in range(3)][2]
    arrays[2].resize_(2, 1)
    assert signature(adapter, arrays)[0] != before


def test_calls_in_turns_make_no_guards(adapter, made):
    one, other = arguments_of(1), arguments_of(1, lengths=(70, 5, 64))
    for _ in range(4):
        assert signature(adapter, one)[0] != signature(adapter, other)[0]
    assert made == []


def test_modes_in_turns_make_one_guard(adapter, made):
    """A guard holds in the mode of autograd that it was made in."""
    arrays = arguments_of(1)
    facts = set()
    for _ in range(6):
        facts.add(signature(adapter, arrays)[0])
        with torch.inference_mode():
            facts.add(signature(adapter, arrays)[0])
    assert len(made) <= 1
    assert len(facts) == 1


def test_a_gradient_is_refused_after_the_same_call_without(adapter, made):
    arrays = arguments_of(1)
    arrays[0].requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            signature(adapter, arrays)
    assert made == []
    with pytest.raises(OptionError, match="requires_grad"):
        signature(adapter, arrays)
    arrays[0].requires_grad_(False)
    for _ in range(3):
        signature(adapter, arrays)
    assert len(made) == 1
    arrays[0].requires_grad_()
    with pytest.raises(OptionError, match="requires_grad"):
        signature(adapter, arrays)


def test_a_negative_view_is_refused_after_the_same_call_without(adapter, made):
    arrays = arguments_of(1)
    for _ in range(3):
        signature(adapter, arrays)
    assert len(made) == 1
    arrays[0] = torch._neg_view(arrays[0])
    with pytest.raises(OptionError, match="negative bit"):
        signature(adapter, arrays)


@pytest.mark.parametrize("make", [None, lambda *a, **b: 1 / 0], ids=["absent", "another one"])
def test_a_torch_without_such_guards(adapter, make):
    adapter._guards._make = make
    found = [signature(adapter, arguments_of(1, seed)) for seed in range(4)]
    assert len({facts for facts, _ in found}) == 1
    assert adapter._guards._make is None


def test_bad_calls_are_refused_after_good_ones():
    arrays = arguments_of(1)
    for _ in range(3):
        flash_mla_with_kvcache(*arrays[:4], 512, *arrays[4:6])
    with pytest.raises(ShapeError):
        flash_mla_with_kvcache(arrays[0][..., :512], *arrays[1:4], 512, *arrays[4:6])
    with pytest.raises(StaleMetadataError):
        flash_mla_with_kvcache(*arrays[:4], 512, arrays[4][:-1], arrays[5])


def test_facts_compare_by_value():
    one, same, other = (torch_guards.Facts((1, x)) for x in ("a", "a", "b"))
    assert one == same and hash(one) == hash(same)
    assert one != other and one != (1, "a")
