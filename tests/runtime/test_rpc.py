import asyncio
import threading
import time

import pytest
import zmq

from megatron_opd.errors import ConfigError, HungUpError, PeerError, SetbackError
from megatron_opd.runtime import rpc, wire
from megatron_opd.types import Address, Done, Export, HostTransport, SendWeights, Stop


def answer_until_stopped(keys, address, replica):
    desk = rpc.Desk(keys, address, rpc.hello("teacher", replica), context=zmq.Context())
    desk.greet()
    while True:
        for number, message in desk.receive():
            match message:
                case SendWeights(version=version):
                    desk.answer(number, Done(seconds={"version": float(version)}))
                case Export(path=path):
                    time.sleep(0.5 if path == "slow" else 0)
                    desk.fail(number, "no space left")
                case Stop():
                    desk.answer(number, Done())
                    desk.close()
                    return


def with_hub(play, tmp_path):
    async def main():
        rpc.make_keys(tmp_path / "keys")
        async with rpc.Hub(tmp_path / "keys", "127.0.0.1", 0) as hub:
            await play(hub)

    asyncio.run(main())


def desk_of(tmp_path, address, role, replica):
    return rpc.Desk(tmp_path / "keys", address, rpc.hello(role, replica), context=zmq.Context())


async def first_request(desk):
    """Its number; probes are no requests."""
    while not (requests := await asyncio.to_thread(desk.receive)):
        await asyncio.sleep(0)
    return requests[0][0]


def with_teachers(count, play, tmp_path):
    async def main():
        keys = tmp_path / "keys"
        rpc.make_keys(keys)
        async with rpc.Hub(keys, "127.0.0.1", 0) as hub:
            threads = [threading.Thread(target=answer_until_stopped, args=(keys, hub.address, i), daemon=True) for i in range(count)]
            for thread in threads:
                thread.start()
            peers = await hub.peers("teacher", count, 60)
            await play(hub, peers)
            for peer in peers:
                await peer.call(Stop(), 5)
            for thread in threads:
                thread.join(5)

    asyncio.run(main())


def test_each_caller_gets_its_own_answer(tmp_path):
    async def play(hub, peers):
        answers = await asyncio.gather(*(peers[i % 2].call(SendWeights(version=i), 5) for i in range(50)))
        assert [a.seconds["version"] for a in answers] == list(range(50))
        assert [p.hello.replica for p in peers] == [0, 1] and all(p.busy_s > 0 and p.outstanding == 0 for p in peers)

    with_teachers(2, play, tmp_path)


def test_a_failure_and_a_silence_name_the_peer(tmp_path):
    async def play(hub, peers):
        with pytest.raises(PeerError, match=r"teacher 0 .*no space left"):
            await peers[0].call(Export(path="x"), 5)
        with pytest.raises(PeerError, match=r"teacher 0 .*did not answer HostTransport, nor anything else, within 0\.2 s"):
            await peers[0].call(HostTransport(receivers=1), 0.2)
        with pytest.raises(PeerError, match=r"learner \[0, 1\] did not report"):
            await hub.peers("learner", 2, 0.1)

    with_teachers(1, play, tmp_path)


def test_a_request_may_queue_behind_others_for_longer_than_its_time(tmp_path):
    """The teacher here answers one after another; the last one after twice its time."""

    async def play(hub, peers):
        slow = [peers[0].call(Export(path="slow"), 1.0) for _ in range(4)]
        answers = await asyncio.gather(*slow, return_exceptions=True)
        assert ["no space left" in str(answer) for answer in answers] == [True] * 4

    with_teachers(1, play, tmp_path)


def test_a_busy_port_is_a_config_error(tmp_path):
    async def play(hub, peers):
        with pytest.raises(ConfigError, match=f"run.port={hub.address.port} cannot be bound"):
            rpc.Hub(tmp_path / "keys", "127.0.0.1", hub.address.port)

    with_teachers(0, play, tmp_path)


def test_a_stranger_with_other_keys_is_never_heard(tmp_path):
    async def main():
        keys, others = tmp_path / "keys", tmp_path / "others"
        rpc.make_keys(keys)
        rpc.make_keys(others)
        (others / "controller.key").write_bytes((keys / "controller.key").read_bytes())  # knows the server, is not on its list
        async with rpc.Hub(keys, "127.0.0.1", 0) as hub:
            desk = rpc.Desk(others, hub.address, rpc.hello("learner", 0), context=zmq.Context())
            desk.greet()
            with pytest.raises(PeerError, match="did not report"):
                await hub.peers("learner", 1, 0.5)
            desk.close()

    asyncio.run(main())


def test_a_role_of_another_version_is_refused_by_name_at_once(tmp_path, monkeypatch):
    async def play(hub):
        good, bad = (desk_of(tmp_path, hub.address, "rollout", i) for i in range(2))
        good.greet()
        await hub.peers("rollout", 1, 60)
        monkeypatch.setattr(wire, "SCHEMA", b"another")
        bad.greet()
        monkeypatch.undo()
        with pytest.raises(PeerError, match=r"rollout 1 .* has messages of schema another, this controller has .* install the same"):
            await asyncio.wait_for(hub.peers("rollout", 2, 60), 10)
        assert [peer.hello.replica for peer in hub.live("rollout")] == [0], "the others are still heard"
        good.close()
        bad.close()

    with_hub(play, tmp_path)


def test_what_is_no_message_and_answers_to_others_are_dropped(tmp_path):
    async def play(hub):
        good, bad = (desk_of(tmp_path, hub.address, "rollout", i) for i in range(2))
        for frames in ([b""], [b"a"] * 9, [wire.SCHEMA, b"hello", b"rollout 1", b"\xc1"], [b"", b"nothing", b"\xff", b""]):
            bad._socket.send_multipart(frames)
        bad.greet()
        good.greet()
        peers = await hub.peers("rollout", 2, 20)
        asking = asyncio.create_task(peers[0].call(Stop(), 20))
        number = await first_request(good)
        bad.fail(number, "says another")
        await asyncio.sleep(0.2)
        good.answer(number, Done())
        assert await asking == Done()
        good.close()
        bad.close()

    with_hub(play, tmp_path)


async def flipping(port, flips):
    """A proxy to `port` that flips a byte of whatever comes next from the role once `flips` is set."""

    async def pump(reader, writer, faulty):
        while data := await reader.read(1 << 16):
            if faulty and flips.is_set():
                flips.clear()
                data = data[:-1] + bytes([data[-1] ^ 1])
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader, writer):
        to_hub = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_hub[1], True), pump(to_hub[0], writer, False), return_exceptions=True)

    return await asyncio.start_server(serve, "127.0.0.1", 0)


def test_a_byte_that_flips_on_the_wire_is_never_read_and_costs_the_role(tmp_path):
    async def play(hub):
        flips = asyncio.Event()
        proxy = await flipping(hub.address.port, flips)
        address = Address(host="127.0.0.1", port=proxy.sockets[0].getsockname()[1])
        desk = desk_of(tmp_path, address, "teacher", 0)
        desk.greet()
        (peer,) = await hub.peers("teacher", 1, 60)
        asking = asyncio.create_task(peer.call(Stop(), 60))
        number = await first_request(desk)
        flips.set()
        desk.answer(number, Done(seconds={"a": 1.0}))
        with pytest.raises(PeerError, match=r"teacher 0 .* is gone"):
            await asyncio.wait_for(asking, 20)
        with pytest.raises(HungUpError, match="closed the connection"):
            await asyncio.to_thread(desk.receive)
        desk.close()
        proxy.close()

    with_hub(play, tmp_path)


def test_keys_are_for_their_owner_only(tmp_path):
    rpc.make_keys(tmp_path / "keys")
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0


def test_an_address_that_nobody_writes_is_not_awaited_for_ever(tmp_path):
    with pytest.raises(PeerError, match="no address in"):
        rpc.await_address(tmp_path / "a.json", 0.1)
    rpc.publish_address(tmp_path / "sub" / "a.json", Address(host="h", port=3))
    assert rpc.await_address(tmp_path / "sub" / "a.json", 0.1) == Address(host="h", port=3)


def test_a_peer_whose_connection_breaks_is_lost_and_whoever_waits_for_it_learns_so_at_once(tmp_path):
    async def main():
        keys, lost = tmp_path / "keys", []
        rpc.make_keys(keys)
        async with rpc.Hub(keys, "127.0.0.1", 0, on_loss=lost.append) as hub:
            first, second = (rpc.Desk(keys, hub.address, rpc.hello("rollout", 0), context=zmq.Context()) for _ in range(2))
            first.greet()
            (peer,) = await hub.peers("rollout", 1, 60)
            asking = asyncio.create_task(peer.call(Stop(), 60))
            await asyncio.sleep(0.1)
            first.close()
            with pytest.raises(PeerError, match=r"rollout 0 .* is gone"):
                await asyncio.wait_for(asking, 10)
            assert lost == [peer] and hub.live("rollout") == [] and hub.ever() == [peer]
            with pytest.raises(PeerError, match="is gone"):
                await peer.call(Stop(), 60)
            second.greet()
            (other,) = await hub.peers("rollout", 1, 60)
            assert other is not peer and hub.everyone() == [other]
            second.close()

    asyncio.run(main())


def test_a_setback_is_told_from_a_failure(tmp_path):
    async def play(hub):
        desk = desk_of(tmp_path, hub.address, "learner", 0)
        desk.greet()
        (peer,) = await hub.peers("learner", 1, 60)
        asking = asyncio.create_task(peer.call(Stop(), 60))
        number = await first_request(desk)
        desk.fail(number, "a receiver is gone", setback=True)
        with pytest.raises(SetbackError, match=r"learner 0 .*: a receiver is gone"):
            await asking
        desk.close()

    with_hub(play, tmp_path)
