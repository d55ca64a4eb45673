"""The images that `versus` converts, made when first asked for and kept in a folder."""
import os
import shutil
import subprocess

FORMAT = {"raw": "raw", "flat": "vmdk", "vmdk": "vmdk", "stream": "vmdk"}  # all others are qcow2
OPTIONS = {"qcow2-zlib": ["-c"], "qcow2-zstd": ["-c", "-o", "compression_type=zstd"],
           "flat": ["-o", "subformat=monolithicFlat"], "stream": ["-o", "subformat=streamOptimized"]}
TERA_EXTENTS = 1000


def format_of(kind):
    return FORMAT.get(kind, "qcow2")


def run(command, **more):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **more)


def real_files(folder, limit, skip=()):
    """Copies real files of this machine into a folder until it holds `limit` bytes."""
    total = 0
    for top in ("/usr/lib", "/usr/share", "/usr/bin", "/opt", "/usr/local", os.path.expanduser("~")):
        for parent, folders, files in os.walk(top):
            folders.sort()
            for name in sorted(files):
                path = os.path.join(parent, name)
                if os.path.islink(path) or not os.path.isfile(path) or path.startswith(tuple(skip)):
                    continue
                size = os.path.getsize(path)
                # One giant file would decide the result.
                if size > limit // 8 or total + size > limit:
                    continue
                to = folder + path
                os.makedirs(os.path.dirname(to), exist_ok=True)
                try:
                    shutil.copyfile(path, to)
                except OSError:
                    continue
                total += size
                if total > limit - (1 << 20):
                    return


def make_raw(path, size, folder):
    """An ext4 file system: a bit more than half real files, a tenth random bytes, the rest unused."""
    tree = os.path.join(folder, "tree")
    shutil.rmtree(tree, ignore_errors=True)
    os.makedirs(tree)
    real_files(tree, size * 55 // 100, skip=(os.path.realpath(folder),))
    with open(os.path.join(tree, "random"), "wb") as random:
        for _ in range(size // 10 >> 20):
            random.write(os.urandom(1 << 20))
    with open(path, "wb") as image:
        image.truncate(size)
    run(["mke2fs", "-q", "-t", "ext4", "-d", tree, path])
    shutil.rmtree(tree)


class Images:
    """Sources by kind, each `size` bytes for the guest unless its name says otherwise."""

    def __init__(self, folder, size, qemu_img, say):
        self.folder, self.size, self.qemu_img, self.say = folder, size, qemu_img, say

    def path(self, kind):
        return os.path.join(self.folder, f"{kind}-{self.size >> 20}M.img")

    def get(self, kind):
        path = self.path(kind)
        if not os.path.exists(path):
            self.say(f"making the source {kind}...")
            self.make(kind, path)
            os.sync()
        return path

    def make(self, kind, path):
        if kind == "raw":
            return make_raw(path, self.size, self.folder)
        if kind == "chain":
            return self.make_chain(path)
        if kind == "empty":
            return run([self.qemu_img, "create", "-f", "qcow2", path, "100G"])
        if kind == "tera":
            return self.make_tera(path)
        source, options = self.get("raw"), OPTIONS.get(kind, [])
        run([self.qemu_img, "convert", "-m", "16", "-W", "-O", format_of(kind), *options, source, path])

    def make_chain(self, path):
        """A compressed base and a compressed overlay that has an eighth of the disk anew."""
        base, changed = self.get("qcow2-zlib"), path + ".changed"
        shutil.copyfile(self.get("raw"), changed)
        # The middle of the disk again at its end: data, not noise.
        run(["dd", f"if={changed}", f"of={changed}", "conv=notrunc", "bs=1M", f"count={self.size // 8 >> 20}",
             f"skip={self.size // 4 >> 20}", f"seek={self.size * 7 // 8 >> 20}"])
        run([self.qemu_img, "convert", "-c", "-O", "qcow2", "-B", base, "-F", "qcow2", changed, path])
        os.unlink(changed)

    def make_tera(self, path):
        """16 TiB, of which 1,000 extents of 64 KiB, evenly spread, hold data."""
        run([self.qemu_img, "create", "-f", "qcow2", path, "16T"])
        step = (16 << 40) // TERA_EXTENTS >> 16 << 16
        writes = "".join(f"write -q -P {n % 255 + 1} {n * step} 64k\n" for n in range(TERA_EXTENTS))
        run(["qemu-io", "-f", "qcow2", path], input=writes.encode())
