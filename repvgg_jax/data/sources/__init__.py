"""Sources of data sets: directories of images, what TFDS has prepared, and digits that need no download."""
