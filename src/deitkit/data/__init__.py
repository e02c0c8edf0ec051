"""Where images are."""

from deitkit.data.dataset import Dataset, Split
from deitkit.data.images import UnreadableImage
from deitkit.data.sources import load_data, refuse_among_images

__all__ = ["Dataset", "Split", "UnreadableImage", "load_data", "refuse_among_images"]
