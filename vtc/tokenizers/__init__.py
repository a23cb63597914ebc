"""Adaptive-length 1D tokenizers: an image becomes an ordered sequence of 1 to K tokens, and back."""

from .base import Tokenizer
from .bottlenecks import FSQ, KL, VQ, Bottleneck, Code, Continuous
from .complexity import Complexity
from .corpus import tokenize_folder
from .detokenize import detokenize_folder
from .images import load_images, to_images
from .oracle import Oracle, Shuffled
from .parse import parse_policy, policy_from
from .policies import Fixed, Halting, MeanBudget, Policy
from .quality import TargetQuality
from .registry import build, from_pretrained, get_tokenizer, list_tokenizers, register_tokenizer
from .sequence import TokenSequence
from .shards import Shard, read_shard, read_tokens, shard_files
from .source import TokenSource

__all__ = [
    "FSQ",
    "KL",
    "VQ",
    "Bottleneck",
    "Code",
    "Complexity",
    "Continuous",
    "Fixed",
    "Halting",
    "MeanBudget",
    "Oracle",
    "Policy",
    "Shard",
    "Shuffled",
    "TargetQuality",
    "TokenSequence",
    "TokenSource",
    "Tokenizer",
    "build",
    "detokenize_folder",
    "from_pretrained",
    "get_tokenizer",
    "list_tokenizers",
    "load_images",
    "parse_policy",
    "policy_from",
    "read_shard",
    "read_tokens",
    "register_tokenizer",
    "shard_files",
    "to_images",
    "tokenize_folder",
]
