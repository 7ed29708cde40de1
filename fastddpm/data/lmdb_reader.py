"""The program that reads an lmdb database for lmdb_source.py: damage in one may end the process
that maps it, and this one is nobody's but its own.

    python -I lmdb_reader.py FOLDER PATHS       PATHS: JSON of sys.path

It writes answers to stdout, each a byte of kind, 8 bytes of length (little endian) and the content:
a `k` of each key, then an `e`; then for each question on stdin, the length of a key and the most
bytes that its value may have (8 bytes each) and the key, a `v` with the value, an `l` with the
length of a longer one, an `n` where there is none. An `x` is the error that ends it.

Standard library and lmdb only: importing more would take longer than reading.
"""

import json
import os
import signal
import struct
import sys


class Damaged(Exception):
    """What is wrong with the file, to follow its name."""


def main(folder, paths):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer; our stdin ends with it
    sys.path[:] = json.loads(paths)
    out = os.fdopen(os.dup(1), "wb")

    def answer(kind, content=b""):
        out.write(kind + struct.pack("<Q", len(content)))
        out.write(content)

    try:
        serve(folder, answer, out.flush)
    except BrokenPipeError:
        return
    except Exception as error:  # whatever damage makes lmdb raise
        words = (
            str(error)
            if isinstance(error, Damaged)
            else (f"can't be read as an lmdb database: {error or type(error).__name__}")
        )
        answer(b"x", words.encode())
        out.flush()


def serve(folder, answer, flush):
    import lmdb

    data = os.path.join(folder, "data.mdb")
    length = os.stat(data).st_size
    environment = lmdb.open(folder, readonly=True, lock=False, readahead=False, create=False)
    pages = environment.info()["last_pgno"] + 1
    if length < pages * environment.stat()["psize"]:
        raise Damaged(f"is truncated: {pages} pages in its header, fewer on the disk")
    with environment.begin() as transaction:
        entries, count, before = transaction.stat()["entries"], 0, None
        # A damaged tree may lead in a circle; keys that ascend do not.
        database = environment.open_db(txn=transaction, create=False)
        ordered = not any(database.flags(transaction).values())  # type: ignore[call-arg]
        for key in transaction.cursor().iternext(keys=True, values=False):
            count += 1
            if count > min(entries, length) or (ordered and before is not None and key <= before):
                raise Damaged(f"is damaged: {entries} keys announced")
            before = key
            answer(b"k", key)
        if count != entries:
            raise Damaged(f"is damaged: {entries} keys announced, {count} found")
    answer(b"e")
    flush()
    while len(head := sys.stdin.buffer.read(16)) == 16:
        key_length, most = struct.unpack("<2Q", head)
        key = sys.stdin.buffer.read(key_length)
        with environment.begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is None:
                answer(b"n")
            elif len(value) > length:
                raise Damaged(f"is damaged: a value has {len(value):,} bytes, the file {length:,}")
            elif len(value) > most:
                answer(b"l", struct.pack("<Q", len(value)))
            else:
                answer(b"v", value)
            flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
