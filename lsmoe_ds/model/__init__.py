"""The tensor-parallel encoder-decoder Transformer."""
