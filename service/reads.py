"""Many small reads of the artifact store at once: each may take tens of milliseconds.

All requests of a process share `READERS` threads for them, apart from those that load models. Not
here: what is read, and how many of it a request may ask for (service.api).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

READERS = 16
_POOL = ThreadPoolExecutor(READERS, thread_name_prefix="read")


async def read_each(read: Callable[[Key], Value], keys: Iterable[Key]) -> list[Value]:
    """Return what a blocking `read` returns for each key, in order; raises what it raises."""
    loop = asyncio.get_running_loop()
    return await asyncio.gather(*(loop.run_in_executor(_POOL, read, key) for key in keys))
