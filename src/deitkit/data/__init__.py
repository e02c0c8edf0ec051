"""Where images are: finds and decodes them, decides which train, validate and test, and names those that cannot be read.

May import `config`, `rng`, `settings`, `terminal` and `waiting`; knows nothing of networks or augmentation.

dataset.py   what a data set and its splits are; how images are scanned, held out and subsampled
caching.py   what is computed once of files and kept; many files at a time
decode.py    the bytes of an image file as upright pixels
listing.py   which files below a folder are images, and of what kinds the others are
folder.py    folders of image files: which are splits, which are classes
labels.py    CSV files that list images and their labels
tables.py    Parquet and Arrow files: data sets of the Hugging Face hub
arrow.py     folders of `deit data cache`, decoded copies
sources.py   data sets known by name (MNIST, CIFAR, ...), downloads, and `load_data`, which takes a path or a name
"""

from deitkit.data.dataset import Dataset, Split
from deitkit.data.decode import UnreadableImage
from deitkit.data.sources import load_data, load_known, refuse_among_images

__all__ = ["Dataset", "Split", "UnreadableImage", "load_data", "load_known", "refuse_among_images"]
