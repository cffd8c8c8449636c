"""Writes the extension module's C from the client library's own header, so that the two cannot
differ: what cffi is told is the header less its preprocessor lines, and the compiler checks every
field and function of it once more.

    generate.py HEADER... OUTPUT
"""

import re
import sys
from pathlib import Path

import cffi

# Called from C with the GIL taken; defined in einsumd/_client.py.
CALLBACKS = """
extern "Python" bool einsumd_on_progress(void *, const struct einsum_client_progress *);
extern "Python" void einsumd_on_name(void *, const char *);
extern "Python" void einsumd_on_result(void *, const struct einsum_client_selftest_result *);
"""


def declarations(header: str) -> str:
    """What cffi's parser takes of a header."""
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif\n", "", header, flags=re.S)
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    return re.sub(r"\bEINSUM_CLIENT_(API|NODISCARD)\b", "", text)


def main() -> None:
    *headers, output = map(Path, sys.argv[1:])
    ffi = cffi.FFI()
    for header in headers:
        ffi.cdef(declarations(header.read_text()))
    ffi.cdef(CALLBACKS)
    includes = "\n".join(f'#include "{header.name}"' for header in headers[1:])
    ffi.set_source("einsumd._native", f'#include "client/{headers[0].name}"\n{includes}')
    ffi.emit_c_code(str(output))


if __name__ == "__main__":
    main()
