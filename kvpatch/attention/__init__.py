"""Attention of stock models, done in another way: what ``kvpatch.patch`` puts into them."""
