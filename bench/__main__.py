"""``python -m aiocomm_bench``."""

import argparse
import sys

from .cli import add_arguments, main

parser = argparse.ArgumentParser(prog="aiocomm bench", description=add_arguments.__doc__)
add_arguments(parser)
sys.exit(main(parser.parse_args()))
