"""Checks a server with libnbd in its strictest mode. Usage: libnbd_check.py SOCKET SIZE"""

import sys
import threading

import nbd

socket, size = sys.argv[1], int(sys.argv[2])
BLOCK = 4096


def connect(structured=True, context=True):
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    # Every check of requests on the client's side, and of every reply's shape.
    handle.set_strict_mode(handle.get_strict_mode() | nbd.STRICT_MASK)
    handle.set_pread_initialize(True)
    if context:
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.set_export_name("disk")
    handle.connect_unix(socket)
    return handle


def expect_error(errno, action):
    try:
        action()
    except nbd.Error as error:
        assert error.errno == errno, (error.errno, errno, error.string)
        return
    raise AssertionError("no error, wanted " + errno)


def flags():
    h = connect()
    assert h.get_size() == size
    assert h.get_protocol() == "newstyle-fixed"
    assert h.get_structured_replies_negotiated()
    for can in ("flush", "fua", "trim", "zero", "fast_zero", "df", "multi_conn", "cache"):
        assert getattr(h, "can_" + can)(), can
    assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    assert not h.is_read_only()
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert h.get_block_size(nbd.SIZE_PREFERRED) == BLOCK
    assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
    h.shutdown()


def reads():
    for structured in (True, False):
        h = connect(structured, structured)
        data = bytes(range(256)) * 64
        h.pwrite(data, 12345)
        assert h.pread(len(data), 12345) == data
        if structured:
            chunks = []

            def chunk(subbuf, offset, status, error):
                assert status == nbd.READ_DATA and error.value == 0
                chunks.append((offset, bytes(subbuf)))

            assert h.pread_structured(len(data), 12345, chunk, nbd.CMD_FLAG_DF) == data
            assert chunks == [(12345, data)]
        large = h.pread(16 << 20, 0)
        assert large[12345:12345 + len(data)] == data
        h.shutdown()


def status():
    h = connect()
    h.zero(4 << 20, 0)
    h.pwrite(b"x" * BLOCK, 3 * BLOCK)
    h.pwrite(b"y" * (2 * BLOCK), 10 * BLOCK)
    got = []

    def extent(context, offset, entries, error):
        assert context == nbd.CONTEXT_BASE_ALLOCATION
        got.append((offset, entries))

    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    h.block_status(20 * BLOCK, 0, extent)
    expected = [3 * BLOCK, hole, BLOCK, 0, 6 * BLOCK, hole, 2 * BLOCK, 0, 8 * BLOCK, hole]
    assert got == [(0, expected)], got
    got.clear()
    h.block_status(20 * BLOCK, 3 * BLOCK + 1, extent, nbd.CMD_FLAG_REQ_ONE)
    assert got == [(3 * BLOCK + 1, [BLOCK - 1, 0])], got
    h.shutdown()


def zeroes():
    h = connect()
    h.pwrite(b"z" * (8 * BLOCK), 0)
    h.zero(BLOCK, 0, nbd.CMD_FLAG_FAST_ZERO)
    h.zero(BLOCK, BLOCK, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    expect_error("ENOTSUP", lambda: h.zero(BLOCK, 2 * BLOCK, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE))
    expect_error("ENOTSUP", lambda: h.zero(100, 2 * BLOCK, nbd.CMD_FLAG_FAST_ZERO))
    h.trim(BLOCK, 2 * BLOCK, nbd.CMD_FLAG_FUA)
    h.zero(100, 3 * BLOCK)
    assert h.pread(3 * BLOCK + 100, 0) == bytes(3 * BLOCK + 100)
    assert h.pread(1, 3 * BLOCK + 100) == b"z"
    h.cache(1 << 20, 0)
    h.flush()
    h.shutdown()


def errors():
    h = connect()
    # The server's answers, so the client must not refuse by itself.
    h.set_strict_mode(0)
    expect_error("EINVAL", lambda: h.pread(2, size - 1))
    expect_error("ENOSPC", lambda: h.pwrite(b"ab", size - 1))
    expect_error("ENOSPC", lambda: h.zero(2, size - 1))
    expect_error("EINVAL", lambda: h.trim(2, size - 1))
    expect_error("EINVAL", lambda: h.pread(1, 0, 1 << 8))
    assert h.pread(1, size - 1) is not None
    h.shutdown()


def many_connections():
    """Disjoint ranges written through four connections with deep queues; one flush, one verifier."""
    share = size // 4
    piece = 64 << 10

    def fill(number):
        h = connect()
        cookies = []
        for index in range(share // piece):
            offset = number * share + index * piece
            data = bytes([1 + (offset // piece) % 251]) * piece
            flags = nbd.CMD_FLAG_FUA if index % 16 == 0 else 0
            cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset, flags=flags))
            while h.aio_in_flight() > 32:
                h.poll(-1)
        while h.aio_in_flight() > 0:
            h.poll(-1)
        assert all(h.aio_command_completed(cookie) for cookie in cookies)
        h.shutdown()

    failures = []

    def guarded(number):
        try:
            fill(number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    h = connect()
    h.flush()
    for offset in range(0, size, piece):
        assert h.pread(piece, offset) == bytes([1 + (offset // piece) % 251]) * piece, offset
    h.shutdown()


def listing():
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_unix(socket)
    names = []
    assert h.opt_list(lambda name, description: names.append((name, description))) == 1
    assert names == [("disk", "a disk in memory")], names
    h.set_full_info(True)
    h.set_export_name("disk")
    h.opt_info()
    assert h.get_export_description() == "a disk in memory"
    assert h.get_canonical_export_name() == "disk"
    h.set_export_name("missing")
    expect_error("ENOENT", h.opt_info)
    contexts = []
    h.set_export_name("")
    h.opt_list_meta_context(lambda name: contexts.append(name))
    assert contexts == ["base:allocation"], contexts
    h.opt_abort()


for check in (flags, reads, status, zeroes, errors, many_connections, listing):
    check()
    print("ok", check.__name__)
