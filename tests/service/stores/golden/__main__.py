"""Writes the files of the program that is there: see __init__.py."""

import asyncio
import sys

from tests.service.stores.golden import write

asyncio.run(write(*sys.argv[1:]))
