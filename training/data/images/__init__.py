"""Image data sets: files of several formats, checked as they are read, become one `ImageSet`."""

from training.data.images.catalogue import DatasetName, Split, open_images
from training.data.images.image_set import DataError, ImageSet

__all__ = ["DataError", "DatasetName", "ImageSet", "Split", "open_images"]
