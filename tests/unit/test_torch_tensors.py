"""Tensors are read natively once their dtype is known. Torch itself is tested on machines that have it."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from aiocomm import _device, _outcome
from aiocomm_native import _core


class Size(tuple[int, ...]):
    """Of torch: a tuple of its own class."""


class Tensor:
    """What torch's has, as far as it is looked at."""

    __module__ = "torch"
    is_cuda, nbytes = True, 24
    shape = Size((3, 4))

    def __init__(self, dtype: str, contiguous: bool = True, device: Any = 2) -> None:
        self.dtype, self.contiguous = dtype, contiguous
        self.device = types.SimpleNamespace(index=device)

    def __torch_function__(self) -> None:
        raise AssertionError("of this only the presence is asked")

    def is_contiguous(self) -> bool:
        return self.contiguous

    def stride(self) -> tuple[int, ...]:
        return (1, 3)

    def data_ptr(self) -> int:
        return 2**63 + 256


@pytest.fixture(scope="module", autouse=True)
def torch() -> Any:
    """A torch whose current stream of device 2 has the handle 1002. The extension finds it once a process."""
    with pytest.MonkeyPatch.context() as patch:
        _outcome.install()  # as communicators do: the extension knows whom to ask
        if "torch" not in sys.modules:
            native = types.ModuleType("torch._C")
            native._cuda_getCurrentRawStream = lambda device: 1000 + device  # type: ignore[attr-defined]
            whole = types.ModuleType("torch")
            whole._C, whole.Tensor = native, Tensor  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "torch", whole)
            patch.setitem(sys.modules, "torch._C", native)
            yield
        else:
            pytest.skip("torch itself is here")


def test_the_same_natively_as_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Tensor("torch.bfloat16")
    expected = tensor, 2**63 + 256, 24, 2, 1002, "bfloat16", (3, 4)
    assert _device.describe(tensor, False) == expected  # and the dtype is known
    monkeypatch.setattr(Tensor, "stride", None)
    asked = []
    monkeypatch.setattr(_device, "current_of_torch", lambda torch, device: asked.append(device) or 7)
    found = _core.describe_array(tensor, True)
    assert found == expected
    assert found is not None
    assert type(found[6]) is tuple
    assert not asked


def test_what_is_unusual_is_left_to_python() -> None:
    _device.describe(Tensor("torch.float16"), False)
    with pytest.raises(_device.UsageError, match="not contiguous"):
        _core.describe_array(Tensor("torch.float16", contiguous=False), False)
    on_host = Tensor("torch.float16")
    on_host.is_cuda = False
    assert _core.describe_array(on_host, False) is None


def test_a_dtype_that_is_new_is_told_once() -> None:
    tensor = Tensor("torch.float8_e5m2")
    for _ in range(2):
        found = _core.describe_array(tensor, False)
        assert found is not None
        assert found[5] == "f8e5m2"
