#!/usr/bin/env python3
"""no_io_uring.py ERRNO PROGRAM [ARGUMENT...]: runs a program whose io_uring_setup(2) fails with ERRNO.

A seccomp filter does it, as the default profiles of container runtimes do.
"""
import ctypes
import os
import struct
import sys

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2
SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 0x00050000, 0x7FFF0000
# The same number on every architecture (Linux 5.1 and later).
IO_URING_SETUP = 425
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06


def instruction(code, jump_true, jump_false, value):
    return struct.pack("HBBI", code, jump_true, jump_false, value)


program = b"".join([
    instruction(LOAD_WORD, 0, 0, 0),  # struct seccomp_data.nr
    instruction(JUMP_IF_EQUAL, 0, 1, IO_URING_SETUP),
    instruction(RETURN, 0, 0, SECCOMP_RET_ERRNO | int(sys.argv[1])),
    instruction(RETURN, 0, 0, SECCOMP_RET_ALLOW),
])
code = ctypes.create_string_buffer(program, len(program))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header), 0, 0)):
    if libc.prctl(*(ctypes.c_ulong(a) for a in arguments)) != 0:
        sys.exit(f"no_io_uring.py: prctl: {os.strerror(ctypes.get_errno())}")
os.execvp(sys.argv[2], sys.argv[2:])
