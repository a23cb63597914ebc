"""Which forward is whose, where several threads run one model."""

import threading

import torch


def thread_key() -> int:
    """The key of this thread's forward. In a compiled graph the graph itself keeps calls apart."""
    return 0 if torch.compiler.is_dynamo_compiling() else threading.get_ident()
