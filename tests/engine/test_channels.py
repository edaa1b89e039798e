from __future__ import annotations

import threading

import pytest

from layerpipe.executors.channels import Channel, ChannelClosed


def test_first_in_first_out() -> None:
    channel = Channel("numbers", blocking=False)
    for i in range(5):
        channel.put(i)
    assert [channel.get() for _ in range(5)] == [0, 1, 2, 3, 4]


def test_an_empty_channel_that_nobody_fills_is_an_error_not_a_hang() -> None:
    with pytest.raises(RuntimeError, match="numbers is empty"):
        Channel("numbers", blocking=False).get()


def test_closing_wakes_every_reader_after_what_was_sent() -> None:
    channel = Channel("numbers", blocking=True)
    seen: list[object] = []

    def read() -> None:
        try:
            while True:
                seen.append(channel.get())
        except ChannelClosed as closed:
            seen.append(str(closed))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    channel.put(1)
    channel.close()
    for reader in readers:
        reader.join(10)
    assert not any(reader.is_alive() for reader in readers)
    assert sorted(map(str, seen)) == ["1", *["numbers"] * 3]
