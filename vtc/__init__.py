"""Fewer vision tokens for any vision-language model: one call wraps it, the same code keeps working."""

__version__ = "0.1.0"

from .api import Handle, compress, restore
from .cost import profile
from .draw import draw
from .evaluation.sweep import sweep
from .hosts import list_hosts
from .method import Merge, Method, Select, get_method, list_methods, load, register, save
from .tokens import Reduction, Tokens

__all__ = [
    "Handle",
    "Merge",
    "Method",
    "Reduction",
    "Select",
    "Tokens",
    "compress",
    "draw",
    "get_method",
    "list_hosts",
    "list_methods",
    "load",
    "profile",
    "register",
    "restore",
    "save",
    "sweep",
]
