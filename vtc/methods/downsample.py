"""The baseline that needs no method: a picture of lower resolution."""

from dataclasses import dataclass

from ..method import register
from .uniform import Uniform


@register
@dataclass
class Downsample(Uniform):
    """Shows the encoder the picture at a resolution of about k patches, so that it makes k tokens itself.

    The picture is shrunk (bicubic, antialiased) after the host's own processor; position embeddings are
    interpolated by the encoder. Where k is no product of rows and columns, the next larger grid is encoded
    and its surplus tokens are dropped evenly.
    """

    name = "downsample"
    lowers_resolution = True
