"""Where images are: finds and decodes them, decides which train, validate and test, and names those that cannot be read.

May import `config`, `rng`, `settings` and `terminal`; knows nothing of networks or augmentation.

dataset.py   what a data set and its splits are; how images are scanned, held out and subsampled
folder.py    folders of image files, and the decoding of a file's bytes
arrow.py     Arrow and Parquet files: data sets of the Hugging Face hub, folders of `deit data cache`, decoded copies
sources.py   data sets known by name (MNIST, CIFAR, ...), downloads, and `load_data`, which takes a path or a name
"""

from deitkit.data.dataset import Dataset, Split, UnreadableImage
from deitkit.data.sources import load_data, refuse_among_images

__all__ = ["Dataset", "Split", "UnreadableImage", "load_data", "refuse_among_images"]
