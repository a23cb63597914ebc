"""Which forward is whose, where several threads run one model."""

import threading
from typing import Any

import torch


def own(table: dict[int, Any]) -> Any:
    """This thread's entry, or None. A module that is compiled alone finds what was stored outside of its
    graph, which dynamo leaves for that."""
    found = table.get(thread_key())
    if found is None and table and torch.compiler.is_dynamo_compiling():
        found = table.get(threading.get_ident())
    return found


def thread_key() -> int:
    """The key of this thread's forward. In a compiled graph the graph itself keeps calls apart."""
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()
