"""`stream=`: what is taken for a stream, and which one is meant where none is given."""

from __future__ import annotations

import subprocess
import sys
import types
from typing import Any

import pytest

from aiocomm._streams import LEGACY, NO_STREAM, resolve
from aiocomm.errors import UsageError, UsageTypeError


class Holder:
    """A stream as a library makes it: attributes by name."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Protocol:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __cuda_stream__(self) -> Any:
        return self._answer


class CUstream:
    """As cuda.bindings has it: converts to its handle; getPtr is where the handle is kept."""

    def __int__(self) -> int:
        return 0x77

    def getPtr(self) -> int:  # noqa: N802
        return 0xBAD


class Array:
    def __init__(self, **interface: Any) -> None:
        self.__cuda_array_interface__ = interface


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, 0),
        (2, 2),
        (0x7F00_1234_5678, 0x7F00_1234_5678),
        (Holder(cuda_stream=0x55, device_index=1), 0x55),  # torch
        (Holder(ptr=0x66), 0x66),  # CuPy
        (CUstream(), 0x77),  # cuda-python
        (Protocol((0, 0x88)), 0x88),  # cuda.core and others
        (Holder(__cuda_stream__=(0, 0x99)), 0x99),
        (Holder(__cuda_stream__=lambda: (0, 0x88), ptr=0xBAD), 0x88),
    ],
)
def test_what_is_a_stream(stream: Any, handle: int) -> None:
    assert resolve(stream, object(), 0) == handle


@pytest.mark.parametrize(
    "stream", ["0", 1.0, True, object(), Protocol(None), Protocol((7, 1)), Protocol((0,))]
)
def test_what_is_not(stream: Any) -> None:
    with pytest.raises(UsageTypeError, match="stream"):
        resolve(stream, object(), 0)


@pytest.mark.parametrize("handle", [-1, 2**64 - 1, 2**64])
def test_integers_that_are_no_handles(handle: int) -> None:
    with pytest.raises(UsageError, match="no stream handle"):
        resolve(handle, object(), 0)


def test_none_is_what_the_array_names() -> None:
    assert resolve(None, Array(stream=0x123), -1) == 0x123
    assert resolve(None, Array(stream=None), -1) == NO_STREAM  # as the interface has it
    assert resolve(None, Array(), -1) == LEGACY
    assert resolve(None, object(), -1) == LEGACY


def test_none_is_torchs_current_stream_of_the_arrays_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = types.SimpleNamespace(
        Tensor=type("Tensor", (), {}),
        cuda=types.SimpleNamespace(current_stream=lambda device: Holder(cuda_stream=0x100 + device)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert resolve(None, torch.Tensor(), 3) == 0x103
    assert resolve(None, Array(stream=9), 3) == 9  # not torch's
    assert resolve(5, torch.Tensor(), 3) == 5


def test_none_is_cupys_current_stream_of_the_arrays_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = types.SimpleNamespace(
        ndarray=type("ndarray", (), {}),
        cuda=types.SimpleNamespace(get_current_stream=lambda device: Holder(ptr=0x200 + device)),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert resolve(None, cupy.ndarray(), 2) == 0x202


def test_no_library_is_imported() -> None:
    program = (
        "import sys; before = set(sys.modules)\n"  # a .pth file may have brought some
        "from aiocomm._streams import resolve\n"
        "class A: __cuda_array_interface__ = {'stream': 3}\n"
        "assert resolve(None, A(), 0) == 3\n"
        "assert not {'torch', 'cupy', 'cuda', 'numba'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
