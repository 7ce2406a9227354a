"""The commands `repvgg-train`, `repvgg-fuse` and `repvgg-predict`."""
