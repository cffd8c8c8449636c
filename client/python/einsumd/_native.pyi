# The extension module that cffi makes of einsum_client.h.
from typing import Any

ffi: Any
lib: Any
