"""One benchmark over all links and their peers: ``aiocomm bench`` or ``python -m aiocomm_bench``."""
