"""What a peer says of the array that it sends is not trusted: what cannot be comes as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from aiocomm import _outcome
from aiocomm._device import DeviceArray

HUGE = [(1 << 63,), ((1 << 64) - 1,), (1 << 62, 1 << 62), (0, 1 << 63)]


@pytest.mark.parametrize("shape", HUGE)
@pytest.mark.parametrize(
    "format", ["B", "d", "V0", "S0", "O", "M8", "a5", "f,f", "(2,3)f", "{", "99999999", ""]
)
@pytest.mark.parametrize("nbytes", [0, 8])
def test_what_cannot_be_is_bytes(shape: tuple[int, ...], format: str, nbytes: int) -> None:
    array = _outcome.make_array(bytearray(nbytes), format, shape)
    assert (array.dtype, array.shape) == (np.uint8, (nbytes,))
    assert repr(array)
    on_gpu = DeviceArray(None, 1 << 20, nbytes, 0, format, shape)
    assert (on_gpu.typestr, on_gpu.shape) == ("|u1", (nbytes,))


@pytest.mark.parametrize("format", ["V0", "M8", "m8"])
def test_elements_that_numpy_would_not_show(format: str) -> None:
    array = _outcome.make_array(bytearray(8), format, (1,))
    assert (array.dtype, array.shape) == (np.uint8, (8,))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_what_is_left_over_is_not_lost(shape: tuple[int, ...]) -> None:
    assert _outcome.make_array(bytearray(24), "d", shape).nbytes == 24
    assert _outcome.make_array(bytearray(8), "d", shape).shape == shape
