"""What scripts/guest-test boots.

image.py vmlinux BZIMAGE LZ4 OUT: unpacks the ELF kernel from a bzImage with LZ4 inside. QEMU starts it by PVH, which
    spares the decompression under emulation.
image.py initramfs OUT NAME=FILE...: makes an initramfs (newc cpio) of these files, all executable.
"""

import struct
import subprocess
import sys


def vmlinux(bzimage, lz4, out):
    with open(bzimage, "rb") as f:
        image = f.read()
    if image[0x202:0x206] != b"HdrS":
        sys.exit(f"image.py: {bzimage} is no bzImage")
    setup = (image[0x1F1] or 4) * 512 + 512
    offset, length = struct.unpack_from("<II", image, 0x248)
    # The last four bytes are the unpacked length, which lz4 would take for a broken block.
    payload = image[setup + offset : setup + offset + length - 4]
    if payload[:4] != b"\x02\x21\x4c\x18":
        sys.exit(f"image.py: {bzimage} is not packed with LZ4 but begins {payload[:4].hex()}")
    elf = subprocess.run([lz4, "-d", "-c"], input=payload, stdout=subprocess.PIPE, check=True).stdout
    if elf[:4] != b"\x7fELF":
        sys.exit(f"image.py: no ELF kernel in {bzimage}")
    with open(out, "wb") as f:
        f.write(elf)


def entry(number, name, mode, data=b"", device=(0, 0)):
    name = name.encode() + b"\0"
    fields = [number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0]
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def initramfs(out, files):
    parts = [("dev", 0o40755, b"", (0, 0)), ("dev/console", 0o20600, b"", (5, 1))]
    folders = {"proc", "sys"}
    for file in files:
        name = file.split("=", 1)[0]
        while name := name.rpartition("/")[0]:
            folders.add(name)
    parts += [(name, 0o40755, b"", (0, 0)) for name in sorted(folders)]
    for name, path in dict(file.split("=", 1) for file in files).items():
        with open(path, "rb") as f:
            parts.append((name, 0o100755, f.read(), (0, 0)))
    parts.append(("TRAILER!!!", 0, b"", (0, 0)))
    with open(out, "wb") as f:
        for number, (name, mode, data, device) in enumerate(parts):
            f.write(entry(number, name, mode, data, device))


match sys.argv[1:]:
    case ["vmlinux", bzimage, lz4, out]:
        vmlinux(bzimage, lz4, out)
    case ["initramfs", out, *files]:
        initramfs(out, files)
    case _:
        sys.exit(__doc__)
