"""Where images come from."""

from deitkit.data.base import Dataset, Split
from deitkit.data.images import UnreadableImage
from deitkit.data.load import load_data, refuse_among_images

__all__ = ["Dataset", "Split", "UnreadableImage", "load_data", "refuse_among_images"]
