"""A stand-in for vLLM: the modules, names and signatures around its attention output projection of
DeepSeek-V4, written anew, on CPU tensors.

common/ is in all of it; operator/, function/ and dispatcher/ are the ways in which versions and
forks have called the projection.
"""
