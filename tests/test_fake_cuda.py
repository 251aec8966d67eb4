"An edit on a GPU that is not there: no tensor on the wrong device, and the CPU waits at most twice for a block and step."

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenflow_nb import propagation
from tokenflow_nb.bench.transfers import empty_sd, empty_sdxl, pretended_gpu, transfers, transfers_table
from tokenflow_nb.propagation import Plan
from tokenflow_nb.support.memory import moved, packed

SIZES = {"sd1.5": (empty_sd, (512, 512), 16, 768), "sdxl": (empty_sdxl, (1024, 1024), 70, 2048)}
PARTS = ["encode", "invert", "decode"] + [f"{name}: {part} pass" for name in ("record", "edit", "edit, live") for part in ("keyframe", "frame")]


@pytest.mark.parametrize("name", SIZES)
def test_the_whole_edit_of_a_real_size_stays_on_its_device_and_hardly_waits(name):
    make, size, layers, width = SIZES[name]
    made = []

    def model():
        made.append(make())
        return made[0]

    found = transfers(model, size)
    assert len(made[0].attentions()) == layers and made[0].unet.config.cross_attention_dim == width
    assert sorted(found) == sorted([*PARTS, "text"]) and len(found["edit: frame pass"]) == 2
    for part in PARTS:
        assert all(each.waits <= 2 and each.downloads <= 2 and each.uploads <= 3 for each in found[part]), transfers_table(found)
    for part in PARTS[-4:]:  # of both edits; the same number for 16 and for 70 layers
        assert all((each.waits, each.downloads) == (1, 1) for each in found[part]), transfers_table(found)


def test_a_transfer_in_each_layer_is_found(monkeypatch):
    "The walk with the plan left on the CPU, as it was: it notices."
    monkeypatch.setattr(Plan, "to", lambda plan, device: plan)
    found = transfers(empty_sd, (256, 256))
    each = found["edit: frame pass"][0]
    assert each.waits > 2 * 16 and each.places["propagation: follow"] == 2 * 2 * 16  # two keyframes, two branches


def test_a_block_in_two_calls_waits_twice(monkeypatch):
    "After memory ran out, branches come one after the other."
    from tokenflow_nb.denoiser import Denoiser

    ready = Denoiser.__post_init__
    monkeypatch.setattr(Denoiser, "__post_init__", lambda self: (ready(self), setattr(self, "sequential", True)))
    found = transfers(empty_sd, (256, 256))
    assert {each.waits for each in found["edit: frame pass"]} == {2}


def test_wrong_devices_are_errors_and_each_kind_of_wait_is_counted():
    with pretended_gpu() as counts:
        there, here = torch.zeros(3, 4, device="cuda:0"), torch.ones(4)
        for wrong in (lambda: there + here, lambda: torch.cat([there, here[None]]), lambda: torch.nn.functional.linear(there, here[None])):
            with pytest.raises(RuntimeError, match="same device|devices"):
                wrong()
        asked = [
            lambda: there.cpu(), lambda: there[0, :1].tolist(), lambda: int(there.max()), lambda: float(there[0, 0]), lambda: bool(there.any()),
            lambda: there.sum().item(), lambda: here.to(there.device), lambda: torch.tensor(5, device=there.device),
            lambda: there[torch.tensor([0, 1])], lambda: torch.equal(there, there), lambda: there[0].copy_(here),
            lambda: there.__setitem__(0, here), lambda: here.to(there.device, non_blocking=True),  # from memory that is not pinned
        ]
        for number, ask in enumerate(asked, 1):
            ask()
            assert counts.waits == number, number
        free = [
            lambda: here.pin_memory().to(there.device, non_blocking=True), lambda: there * 2, lambda: there[0, None, 1:], lambda: there[:, ::2],
            lambda: torch.full((), 3, device=there.device), lambda: here.numpy(), lambda: here.sum().item(), lambda: there[1].copy_(there[0]),
        ]
        for ask in free:
            ask()
        assert counts.waits == len(asked)
        assert there[0, None, 1:].shape == (1, 3) and there[:, ::2].shape == (3, 2) and there[torch.tensor([0, 1])].shape == (2, 4)


def test_afterwards_all_is_as_before():
    before = propagation.fused_nearest, propagation._fused_works, torch._C._only_lift_cpu_tensors()
    with pytest.raises(ZeroDivisionError), pretended_gpu():
        1 / 0
    assert before == (propagation.fused_nearest, propagation._fused_works, torch._C._only_lift_cpu_tensors())
    assert type(torch.ones(2) + 1) is torch.Tensor and torch.ones(2).tolist() == [1, 1]


def test_packed_tensors_come_apart_bit_for_bit_and_can_be_stored(tmp_path):
    types = (torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32, torch.int64, torch.bool)
    tensors = {f"{place}-{dtype}": torch.randint(-3, 4, (place, 3)).to(dtype) for place in (1, 3, 0) for dtype in types}
    tensors["turned"] = torch.randn(3, 5).T
    content, unpacked = packed(tensors)
    apart = unpacked(content)
    assert list(apart) == list(tensors)
    assert all(torch.equal(apart[name], value) and apart[name].dtype == value.dtype for name, value in tensors.items())
    parts = {name: value[:2] for name, value in apart.items()}
    save_file(parts, tmp_path / "part.safetensors")  # as a record writes them: views of the same memory
    again = load_file(tmp_path / "part.safetensors")
    assert all(torch.equal(again[name], value[:2]) for name, value in tensors.items())


@pytest.mark.gpu
def test_a_real_gpu_gets_and_gives_the_same_bits():
    tensors = dict(field=torch.arange(7).to(torch.int16), feature=torch.randn(3, 5).half(), weight=torch.rand(4))
    there = moved(tensors, "cuda")
    assert all(value.is_cuda for value in there.values())
    assert all(torch.equal(value, tensors[name]) for name, value in moved(there, "cpu").items())
