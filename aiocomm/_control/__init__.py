"""The control plane: bootstrap, authentication, membership and pair connections, on a thread of its own.

`address`, `auth`, `membership` and `wire` are pure: no sockets, no clock, no threads. `plane` is the way in.
"""
