"""Collective operations: pure schedules, a cost model that chooses among them, and what runs them.

`steps` is the vocabulary, one file per algorithm says who sends what to whom, `simulator` runs schedules
without sockets, `cost` chooses, `plan` caches, `call` runs a schedule on transfers, `operations` is the
public interface.
"""
