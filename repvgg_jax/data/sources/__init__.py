"""Where data sets come from: directories of images, what TFDS has prepared, and digits that need no download."""
