"""Training of compressors with weights, on a user's own pictures and questions."""

from .config import Config, Data, Stage
from .reading import read_config
from .run import train

__all__ = ["Config", "Data", "Stage", "read_config", "train"]
