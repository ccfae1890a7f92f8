"""Asyncio-native communication between processes: awaitable send, recv, put and get.

```python
import aiocomm

async with aiocomm.connect() as comm:
    await comm.send(array, dst=1)
```
"""

from aiocomm._version import __version__
from aiocomm.arrays import DeviceArray, empty
from aiocomm.channel import Channel
from aiocomm.communicator import Communicator
from aiocomm.connecting import connect
from aiocomm.errors import (
    AiocommError,
    AuthenticationError,
    ClosedError,
    DeadlineExceeded,
    ExpertsLostError,
    LinkError,
    PeerError,
    PeerLostError,
    StaleHandleError,
    TransferCancelled,
    TruncationError,
    UsageError,
    WouldBlock,
)
from aiocomm.group import Group
from aiocomm.histogram import Histogram
from aiocomm.launch import WorkerError, spawn
from aiocomm.link import LinkHandle
from aiocomm.moe import Dispatched
from aiocomm.pages import PageLease, Pages, RemotePages
from aiocomm.region import Region, RemoteRegion
from aiocomm.runner import run
from aiocomm.statistics import LinkStatistics, Statistics
from aiocomm.threads import ThreadedCommunicator
from aiocomm.types import (
    ANY_SOURCE,
    ANY_TAG,
    MAX_TAG,
    Completion,
    Event,
    Fallback,
    Feed,
    LinkDown,
    LinkUp,
    Notification,
    Peer,
    PeerJoined,
    PeerLost,
    Priority,
    Status,
    Submission,
    Undelivered,
)
from aiocomm_native import Transfer

__all__ = [
    "ANY_SOURCE",
    "ANY_TAG",
    "MAX_TAG",
    "AiocommError",
    "AuthenticationError",
    "Channel",
    "ClosedError",
    "Communicator",
    "Completion",
    "DeadlineExceeded",
    "DeviceArray",
    "Dispatched",
    "Event",
    "ExpertsLostError",
    "Fallback",
    "Feed",
    "Group",
    "Histogram",
    "LinkDown",
    "LinkError",
    "LinkHandle",
    "LinkStatistics",
    "LinkUp",
    "Notification",
    "PageLease",
    "Pages",
    "Peer",
    "PeerError",
    "PeerJoined",
    "PeerLost",
    "PeerLostError",
    "Priority",
    "Region",
    "RemotePages",
    "RemoteRegion",
    "StaleHandleError",
    "Statistics",
    "Status",
    "Submission",
    "ThreadedCommunicator",
    "Transfer",
    "TransferCancelled",
    "TruncationError",
    "Undelivered",
    "UsageError",
    "WorkerError",
    "WouldBlock",
    "__version__",
    "connect",
    "empty",
    "run",
    "spawn",
]
